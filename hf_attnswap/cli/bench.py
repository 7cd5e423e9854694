"""Hold the command that times the attention alone, beside the best that torch has for it."""

from typing import Annotated

import typer
from rich.table import Table

from ..errors import UsageError
from .options import Device, Dtype, Json, Model, show, status


def bench(
    model: Model,
    attention: Annotated[list[str] | None, typer.Option("--attention", help="may be repeated; all by default")] = None,
    lengths: Annotated[list[int] | None, typer.Option("--length", min=1, help="may be repeated")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = 5,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1)] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="of the CPU; torch's choice by default")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time and memory of the attention alone, at the head shape of MODEL, beside torch's SDPA. Reads no weights.

    SDPA takes the fastest kernel that torch has for these inputs; which one, the table says.

    Example: attnswap bench HuggingFaceTB/SmolLM2-135M-Instruct --attention elu --length 8192 --threads 1
    """
    import torch

    from .. import available, inspect
    from ..attentions import get
    from ..benchmark.attention import bench as measure
    from ..benchmark.attention import random_inputs, scaling, sdpa_kernel
    from ..integration.finding import head_shape
    from ..ops.backends import told
    from ..sources.models import architecture, find_device, find_dtype

    if threads:
        torch.set_num_threads(threads)
    built = architecture(model)
    heads = head_shape(built, inspect(built))
    names = attention or [cls.name for cls in available() if cls.name != "softmax"]
    where, kind = find_device(device), find_dtype(dtype)
    variants = {name: _checked(get, name)(heads).to(where, kind) for name in names}
    lengths = lengths or [512, 1024, 2048, 4096]
    told_of = {"batch_size": batch_size, "dtype": kind, "device": where}
    kernel = sdpa_kernel(random_inputs(heads, min(lengths), **told_of))
    with status("measuring") as say:
        rows = measure(variants, heads, lengths, rounds=rounds, progress=lambda n: say(f"{n} tokens: done"), **told_of)
    grown = scaling(rows)
    table = Table(
        title=f"times as fast as SDPA ({kernel}), median (lowest to highest of {rounds} rounds)\n{heads}, batch "
        f"{batch_size}, {dtype}, {where}, {torch.get_num_threads()} threads",
    )
    for column in ("attention", "length", "forward", "forward + backward", "peak MiB", "SDPA's peak MiB", "backend"):
        table.add_column(column, justify="left" if column in ("attention", "backend") else "right")
    for row in rows:
        table.add_row(
            row.attention,
            str(row.length),
            str(row.forward),
            str(row.forward_backward),
            *("?" if m is None else f"{m:.0f}" for m in (row.peak_memory_mib, row.sdpa_peak_memory_mib)),
            told(row.backends) or "torch's own",
        )
    growing = Table(title="how the time of the forward pass grows, and where it becomes less than SDPA's")
    for column in ("attention", "n to the power of (95 %)", "faster from"):
        growing.add_column(column, justify="left" if column == "attention" else "right")
    for found in grown:
        growing.add_row(found.attention, str(found.growth or "?"), _from(found, min(lengths)))
    content = {
        "sdpa": kernel,
        "rows": [vars(r) | {"forward": vars(r.forward), "forward_backward": vars(r.forward_backward)} for r in rows],
        "scaling": [vars(found) | {"growth": found.growth and vars(found.growth)} for found in grown],
    }
    show(as_json, content, table, *([growing] if len(set(lengths)) > 1 else []))


def _from(found, shortest: int) -> str:
    """Return in words the length from which on a variant is faster."""
    if found.faster_from is None:
        return "-" if found.attention == "sdpa" else "never here"
    return f"{'<= ' if found.faster_from <= shortest else ''}{found.faster_from:.0f}"


def _checked(call, *arguments):
    try:
        return call(*arguments)
    except ValueError as error:
        raise UsageError(str(error)) from None
