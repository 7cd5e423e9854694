"""Hold the command that tells what this installation has, and what of it runs on this machine."""

import importlib.metadata
import os
import platform
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .options import Json, show

PACKAGES = ("hf_attnswap", "torch", "transformers", "accelerate", "peft", "triton")


def doctor(as_json: Json = False) -> None:
    """What is installed, which kernels were built, and which form of each op runs on this machine.

    Example: attnswap doctor
    """
    from ..ops.backends import OPS, VARIABLE, forced, on_machine

    devices = _devices()
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": _machine(),
        "kernels": _kernels(),
        "forced": {"variable": VARIABLE, "value": os.environ.get(VARIABLE), "backends": forced()},
        "ops": {op: {device: on_machine(op, device) for device in devices} for op in sorted(OPS)},
    }
    show(as_json, found, _facts(found), _forms(found, devices))


def _devices() -> list[str]:
    """Return the types of the devices that are there: "cpu", and that of an accelerator."""
    import torch

    there = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
    if not there:
        return ["cpu"]
    return ["cpu", torch.accelerator.current_accelerator().type if hasattr(torch, "accelerator") else "cuda"]


def _version(name: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    if name == "hf_attnswap":
        from .. import __version__

        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    """Return the processor, the cores, torch's threads, the platform, and the accelerator by its name, or None."""
    import torch

    from ..tradeoff.machine import machine

    told = vars(machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    return {name: told[name] for name in ("processor", "cores", "threads", "platform", "device")}


def _kernels() -> dict[str, Any]:
    """Return which instruction sets the CPU kernels are built for and which one runs, or why there are none."""
    from .. import native

    missing = native.missing()
    return {
        "library": str(native.LIBRARY),
        "built_for": [] if missing else list(native.instruction_sets()),
        "runs": None if missing else native.instruction_set(),
        "missing": missing,
        "says": native.describe(),
    }


def _facts(found: dict[str, Any]) -> Table:
    """Return a table of all that does not belong to one op."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    machine, value = found["machine"], found["forced"]["value"]
    rows = {name: version or "not installed" for name, version in found["versions"].items()}
    rows["machine"] = f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads of torch"
    rows["platform"] = machine["platform"]
    rows["device"] = machine["device"]
    rows["kernels"] = found["kernels"]["says"]
    rows[found["forced"]["variable"]] = value or "not set: each call takes the first form that can serve it"
    for what, told in rows.items():
        table.add_row(what, told)
    return table


def _forms(found: dict[str, Any], devices: list[str]) -> Table:
    """Return a table with one line per op and device: the form that serves calls, and those behind it."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("op", "device", "runs", "where that cannot serve a call"):
        table.add_column(column)
    for op, by_device in found["ops"].items():
        for device in devices:
            runs = [form["backend"] for form in by_device[device] if form["missing"] is None]
            table.add_row(op, device, runs[0] if runs else "nothing", ", ".join(runs[1:]) or "an error")
    return table
