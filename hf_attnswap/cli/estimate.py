"""Hold the command that says what a conversion will need, before anything runs."""

from typing import Annotated

import typer

from .options import Json, Keep, Kinds, Layers, Model, Options, Plan, TrustRemoteCode, show, status, swap_asked


def estimate(
    model: Model,
    plan: Plan = None,
    attention: Annotated[str | None, typer.Option("--attention", help="in place of a plan, see `attnswap ls`")] = None,
    layers: Layers = None,
    keep: Keep = None,
    kind: Kinds = None,
    option: Options = None,
    tokens: Annotated[str, typer.Option("--tokens", help="tokens of each stage, such as 500000, 100M, 2.5B")] = "100M",
    length: Annotated[int, typer.Option("--length", min=1, help="tokens of a block, and of a prompt")] = 2048,
    device: Annotated[
        str | None, typer.Option("--device", help="h100, h200, a100, ... by data sheet; cpu and cuda are measured here")
    ] = None,
    num_devices: Annotated[int, typer.Option("--num_devices", min=1, help="that share the work")] = 1,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="blocks per device and step")] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient_checkpointing", help="distill and finetune compute layers again: less memory")
    ] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="bfloat16, on a CPU float32, without it")] = None,
    price_per_hour: Annotated[
        float | None, typer.Option("--price_per_hour", min=0.0, help="of one device, for the cost")
    ] = None,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Memory, time and cost of training and serving a conversion, from shapes alone. Reads no weights.

    Known GPUs are reckoned with by their data sheets, and the device at hand is measured for some seconds.

    Example: attnswap estimate meta-llama/Llama-3.1-70B --plan plan.yaml --length 8192 --device h100 --num_devices 8
    """
    from ..estimate import dtype_for, find_device, parse_tokens
    from ..estimate import estimate as reckon
    from ..estimate.table import notes, tables
    from ..integration.swapping import swap
    from ..sources.models import architecture, find_dtype

    count = parse_tokens(tokens)
    wanted = None if dtype is None else find_dtype(dtype)
    asked = swap_asked(plan, attention, layers, keep, kind, option)
    with status("the device") as say:
        where = find_device(device)
        say("the model")
        built = architecture(model, trust_remote_code).eval()
        if any(given is not None for given in (plan, attention, layers, keep, kind, option)):
            swap(built, asked(built))
        built = built.to(wanted or dtype_for(where))
        found = reckon(
            built, model, where, tokens=count, length=length, num_devices=num_devices, batch_size=batch_size,
            gradient_checkpointing=gradient_checkpointing, price_per_hour=price_per_hour, say=say,
        )  # fmt: skip
    show(as_json, found.as_dict(), *tables(found), "\n".join(notes(found)))
