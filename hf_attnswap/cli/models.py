"""Hold the commands that inspect a model and that swap its attention."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .options import (
    AllowPickle,
    Dtype,
    Json,
    Keep,
    Kinds,
    Layers,
    Model,
    Options,
    Plan,
    Revision,
    TrustRemoteCode,
    show,
    swap_asked,
)


def inspect_model(model: Model, as_json: Json = False, trust_remote_code: TrustRemoteCode = False) -> None:
    """Which attention modules of a model can be swapped, and why the others cannot. Reads no weights.

    Example: attnswap inspect HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from .. import inspect
    from ..sources.models import architecture

    found = inspect(architecture(model, trust_remote_code))
    table = Table(title=model)
    for column in ("module", "class", "part", "kind", "layer", "sees", "runs", "can be swapped"):
        table.add_column(column, overflow="fold")
    for m in found:
        can = f"no: {m.reason}" if m.reason else "yes"
        row = (m.name, m.class_name, m.part, m.kind, str(m.layer), str(m.reach), m.swapped or "softmax", can)
        table.add_row(*row)
    show(
        as_json,
        [m.as_dict() for m in found],
        table if found else f"{model} has no attention module that could be swapped",
    )


def convert(
    model: Model,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="a new or empty folder")],
    attention: Annotated[str | None, typer.Option("--attention", help="see `attnswap ls`; hedgehog+window")] = None,
    layers: Layers = None,
    keep: Keep = None,
    kind: Kinds = None,
    option: Options = None,
    plan: Plan = None,
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
    from ..integration.swapping import describe, swap
    from ..sources.files import require_empty, whole_folder
    from ..sources.models import load_any

    require_empty(output_dir)
    asked = swap_asked(plan, attention, layers, keep, kind, option)
    loaded, processor = load_any(
        model, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    swap(loaded, asked(loaded))
    with whole_folder(output_dir) as folder:
        loaded.save_pretrained(folder, portable=portable)
        if processor is not None:
            processor.save_pretrained(folder)
    print(f"{output_dir}: {describe(loaded)}, not trained" + ("" if processor else "; it has no tokenizer"))
