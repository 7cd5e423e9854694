"""Share between commands their arguments, the choice of a text, and how results are printed."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import SwapConfig

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a Hub id, a folder, or a .gguf file")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; CUDA where there is one")]
Revision = Annotated[str | None, typer.Option("--revision", help="of a Hub model")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust_remote_code", help="run code that the model's repository brings")
]
AllowPickle = Annotated[bool, typer.Option("--allow_pickle", help="read pickled weights where it has no safetensors")]
AttentionName = Annotated[str, typer.Option("--attention", help="a variant, see `attnswap ls`")]
Layers = Annotated[str | None, typer.Option("--layers", help="all, or a slice '1::2', or indices '0,3,5'")]
Keep = Annotated[
    str | None, typer.Option("--keep", help="groups that keep softmax in these layers: layer.group, '18.2,8.0'")
]
Plan = Annotated[
    Path | None, typer.Option("--plan", help="a plan.yaml, in place of attention, layers, keep, kind and option")
]
Kinds = Annotated[
    list[str] | None, typer.Option("--kind", help="causal, bidirectional or cross; may be repeated; the first two")
]
Options = Annotated[list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="an option of the variant")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="of the order of text")]
TrainFile = Annotated[str | None, typer.Option("--train_file", help="text, json, parquet or csv")]
ValidationFile = Annotated[
    str | None, typer.Option("--validation_file", help="held-out text; else a fifth is held out")
]
DatasetName = Annotated[str | None, typer.Option("--dataset_name", help="a dataset of the Hub, in place of files")]
DatasetConfig = Annotated[str | None, typer.Option("--dataset_config_name", help="its configuration")]
TextColumn = Annotated[str, typer.Option("--text_column", help="the column that holds the text")]


def swap_asked(
    plan: Path | None,
    attention: str | None,
    layers: str | None,
    keep: str | None,
    kind: list[str] | None,
    option: list[str] | None,
) -> "Callable[[PreTrainedModel], SwapConfig]":
    """Return what the options of a command say of the swap, as a function of the model that is to be swapped.

    The function raises UsageError where a plan was made for another model.

    Raises:
        UsageError: a plan together with the other options, or a value that is none.
    """
    from ..config import SwapConfig, layers_of, parse_options, places_of
    from ..sources.plans import read_plan

    if plan is None:
        config = SwapConfig(
            SwapConfig.attention if attention is None else attention, layers_of(layers), parse_options(option or []),
            kind or SwapConfig.kinds, places_of(keep),
        )  # fmt: skip
        return lambda model: config
    given = {"--attention": attention, "--layers": layers, "--keep": keep, "--kind": kind, "--option": option}
    told = [name for name, value in given.items() if value]
    if told:
        raise UsageError(f"--plan says all of the swap: leave out {' and '.join(told)}")
    read = read_plan(plan)

    def of_plan(model: "PreTrainedModel") -> "SwapConfig":
        read.require(model)
        return read.swap

    return of_plan


def show(as_json: bool, content: Any, *renderables: Any) -> None:
    """Print `content` as JSON, or else the renderables on the terminal."""
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        # What stands in [brackets] or between :colons: is part of a name.
        Console(markup=False, emoji=False).print(*renderables)


@contextmanager
def status(line: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr what is going on while the context is open; yield the function that changes the line."""
    with Console(stderr=True).status(Text(line)) as shown:
        yield lambda line: shown.update(Text(line))


def text_source(file, dataset_name, dataset_config_name, split, column):
    """Return the text that a file or a dataset names.

    Raises:
        UsageError: both a file and a dataset, or none.
    """
    from ..sources.texts import TextSource

    if (file is None) == (dataset_name is None):
        raise UsageError("give text: either a file or --dataset_name")
    return TextSource(file or dataset_name, split=split, config_name=dataset_config_name, column=column)


def table_of(title: str, rows: Sequence[dict[str, Any]], **columns: str) -> Table:
    """Return a table of `rows`; each column has a title and the key that it shows, ? where there is nothing.

    Args:
        columns: title (underscores for spaces) to key.
    """
    table = Table(title=title)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right", overflow="fold")  # no digit is lost
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns.values()))
    return table


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "?"
    if isinstance(value, dict):  # an interval
        if value["low"] is None:
            return f"{value['value']:.4g} (no interval)"
        few = "*" if value.get("few") else ""
        return f"{value['value']:.4g} ({value['low']:.4g} to {value['high']:.4g}){few}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
