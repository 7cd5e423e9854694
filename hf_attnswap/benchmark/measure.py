"""Measure time and memory: rounds in which the candidates take turns, and ratios with their spread."""

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
    """Return the wall time of one call of `run` in seconds; work that the call queues on a GPU counts."""
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
    """Time each candidate in each round.

    In a round the candidates take turns, so that they share the noise of the machine.

    Args:
        candidates: functions to call, by name.
        rounds: rounds that count.
        warmup: rounds before the others, which do not count.
        budget_s: seconds; no round begins that would end later. The first round always runs. Where the budget ends the
            rounds early, all rounds that ran count, since calls that long need no warm-up.

    Returns:
        Seconds per round, by name.
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
    """Return how many times faster than the control `ours` is in each round; both arguments are seconds by round."""
    return [c / o for c, o in zip(control, ours, strict=True)]


def speedup(control: list[float], ours: list[float]) -> Spread:
    """Return the median and the extremes of `ratios`."""
    return Spread.of(ratios(control, ours))


def peak_memory_mib(run: Callable[[], Any], device: torch.device | str = "cpu") -> float | None:
    """Return the MiB that a call needs at its peak beyond what was in use before; None where the system does not tell.

    On CUDA the numbers come from torch's allocator; on Linux from the peak resident size of the process, which is reset
    before the call. Other systems do not report memory, nor do sandboxes that forbid the reset.
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
    """Give memory that earlier calls freed back to the system, or a call that reuses it would seem to need none."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
