"""Clocks and memory: rounds in which the candidates take turns, and ratios with their spread."""

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..statistics import Spread


def seconds(run: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Wall time of one call; a GPU is waited for."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device | str = "cpu",
    warmup: int = 1,
    budget_s: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; in a round they take turns, so that they share its noise.

    Args:
        warmup: rounds before the others, which do not count.
        budget_s: no round begins that would end later than this. The first always runs, and where the budget ends the
            rounds early, all that ran count: calls that long need no warm-up.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    elapsed, done = 0.0, 0
    while done < warmup + rounds:
        for name, run in candidates.items():
            times[name].append(seconds(run, device))
        done += 1
        last = sum(values[-1] for values in times.values())
        elapsed += last
        if elapsed + last > budget_s:
            break
    return times if done < warmup + rounds else {name: values[warmup:] for name, values in times.items()}


def ratios(control: list[float], ours: list[float]) -> list[float]:
    """How many times faster than the control, round by round."""
    return [c / o for c, o in zip(control, ours, strict=True)]


def speedup(control: list[float], ours: list[float]) -> Spread:
    """Median and extremes of `ratios`."""
    return Spread.of(ratios(control, ours))


def peak_memory_mib(run: Callable[[], Any], device: torch.device | str = "cpu") -> float | None:
    """What a call needs at its highest on top of what was there before, in MiB; None where the system does not tell.

    On CUDA from torch's allocator; on Linux from the process's peak resident size, which is reset before the call.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if sys.platform != "linux":
        return None
    _return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # some sandboxes forbid it
        return None
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 1024


def _return_freed_memory() -> None:
    """Give what earlier calls freed back to the system, or a call that reuses it would seem to need nothing."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
