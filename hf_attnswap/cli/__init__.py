"""The `attnswap` command: thin wrappers that print, and one clear line where something is wrong."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..errors import UsageError, one_line_errors
from . import bench, diagnose, evaluate, publish, report, tradeoff
from .options import (
    AllowPickle,
    AttentionName,
    Dtype,
    Json,
    Kinds,
    Layers,
    Model,
    Options,
    Revision,
    TrustRemoteCode,
    layers_of,
    show,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Replace the softmax attention of pretrained transformers models, and measure what it costs.",
)

# typer may bring a click of its own, so the base of its errors is found from one that it names.
_ClickException = typer.BadParameter.__base__.__base__

app.command()(evaluate.evaluate)
app.command()(diagnose.diagnose)
app.command()(bench.bench)
app.command()(tradeoff.tradeoff)
app.command()(report.report)
app.command()(publish.card)
app.command()(publish.push)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(publish.run)


def main() -> None:
    """Run the command line and exit: 0 on success, 2 on wrong use, 1 on failure, 130 when interrupted."""
    with one_line_errors("attnswap"):
        try:
            code = app(standalone_mode=False, prog_name="attnswap")
        except _ClickException as error:
            if len(sys.argv) < 2:
                error.show()  # the help
                sys.exit(2)
            raise UsageError(error.format_message()) from error
        if code == 130:  # typer has taken the interrupt
            raise KeyboardInterrupt
    sys.exit(code)


@app.command("ls")
def list_attentions(as_json: Json = False) -> None:
    """The variants: what each computes, costs, takes, refuses and learns.

    Example: attnswap ls
    """
    from .. import available
    from ..ops.backends import OPS, backends_of

    entries = [_description(cls) for cls in available()]
    runs = ", ".join(f"{op} {backends_of(op)[0]}" for op in sorted(OPS))
    formulas = Table("name", "computes", "options", "source", title="What they compute")
    traits = Table("name", "cost", "attention", "masks", "state", "learns", title="What they take, keep and learn")
    traits.caption = (
        "Controls are for comparison. Attention: all means causal, bidirectional, cross. Masks: any includes a bias, "
        "a soft cap and sinks; padding, packed refuses all others. State: kept between generated tokens; constant does "
        "not grow. "
        f"None takes attention dropout. Backends that run: {runs} (HF_ATTNSWAP_BACKEND puts another in front)."
    )
    for e in entries:
        options = ", ".join(f"{n}={o['default']}" for n, o in e["options"].items())
        what = (e["name"] + ("\n(control)" if e["control"] else ""), e["formula"], options, e["source"])
        kinds = "all" if len(e["kinds"]) == 3 else ", ".join(e["kinds"])
        formulas.add_row(*map(escape, what))
        traits.add_row(*map(escape, (e["name"], e["cost"], kinds, e["masks"], e["state"], ", ".join(e["parameters"]))))
    for table in (formulas, traits):
        table.box, table.pad_edge = SIMPLE_HEAD, False
        for column in table.columns:
            column.overflow, column.no_wrap = "fold", column.header == "name"
    show(as_json, entries, formulas, traits)


def _description(cls: type) -> dict[str, Any]:
    from ..attentions import Heads
    from ..ops.backends import backends_of

    return {
        "name": cls.name,
        "control": cls.control,
        "formula": cls.formula,
        "cost": cls.cost,
        "cost_class": cls.cost_class,
        "backend": backends_of(cls.ops[0])[0] if cls.ops else "torch",
        "ops": list(cls.ops),
        "kinds": list(cls.kinds),
        "masks": "any" if cls.any_mask else "padding, packed",
        "state": "constant" if cls.stateful else "keys, values",
        "parameters": [name for name, _ in cls(Heads(1, 1, 1)).named_parameters()],
        "options": {n: {"default": o.default, "help": o.help} for n, o in cls.options().items()},
        "source": cls.source,
    }


@app.command("inspect")
def inspect_model(model: Model, as_json: Json = False, trust_remote_code: TrustRemoteCode = False) -> None:
    """Which attention modules of a model can be swapped, and why the others cannot. Reads no weights.

    Example: attnswap inspect HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from .. import inspect
    from ..sources.models import architecture

    found = inspect(architecture(model, trust_remote_code))
    table = Table(title=model)
    for column in ("module", "class", "part", "kind", "layer", "runs", "can be swapped"):
        table.add_column(column, overflow="fold")
    for m in found:
        can = f"no: {m.reason}" if m.reason else "yes"
        table.add_row(m.name, m.class_name, m.part, m.kind, str(m.layer), m.swapped or "softmax", can)
    show(
        as_json,
        [m.as_dict() for m in found],
        table if found else f"{model} has no attention module that could be swapped",
    )


@app.command()
def convert(
    model: Model,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="a new or empty folder")],
    attention: AttentionName = "hedgehog+window",
    layers: Layers = None,
    kind: Kinds = None,
    option: Options = None,
    dtype: Dtype = "auto",
    portable: Annotated[
        bool, typer.Option("--portable", help="add a file that loads it without hf_attnswap, under trust_remote_code")
    ] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Swap the attention of a model and save it, untrained. Load it after `import hf_attnswap` as any model.

    Example: attnswap convert HuggingFaceTB/SmolLM2-135M --attention relu_power --option p=16 --output_dir relu16
    """
    from .. import SwapConfig
    from ..integration.swapping import describe, swap
    from ..sources.files import require_empty, whole_folder
    from ..sources.models import load_any
    from ..tradeoff import parse_options

    require_empty(output_dir)
    loaded, processor = load_any(
        model, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    swap(loaded, attention, layers=layers_of(layers), kinds=kind or SwapConfig.kinds, **parse_options(option or []))
    with whole_folder(output_dir) as folder:
        loaded.save_pretrained(folder, portable=portable)
        if processor is not None:
            processor.save_pretrained(folder)
    print(f"{output_dir}: {describe(loaded)}, not trained" + ("" if processor else "; it has no tokenizer"))
