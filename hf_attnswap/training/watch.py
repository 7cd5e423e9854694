"""Detect losses that jump or are not finite, and say where the trouble begins."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attentions import Attention


def spike(losses: Sequence[float], window: int = 32) -> float | None:
    """Return the last loss divided by the mean of the losses before, where the last loss stands out; else None.

    A loss stands out where it exceeds that mean by six standard deviations and by a fifth. Fewer than 16 losses before
    the last one are too few.

    Args:
        window: how many losses before the last one count.
    """
    before = losses[-window - 1 : -1]
    if len(before) < 16:
        return None
    mean = statistics.fmean(before)
    if losses[-1] <= max(1.2 * mean, mean + 6 * statistics.stdev(before)):
        return None
    return losses[-1] / mean


def first_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Return in words the first weight or else the first output that is not finite; None where all are finite.

    Weights are checked first. Then `forward` runs without gradients, and the modules are checked in the order in which
    they end, so inner modules before the modules that hold them.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name}"
    found: list[str] = []

    def hook(name: str):
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(tensor.isfinite().all() for tensor in _tensors(output)):
                own = f" ({module.name})" if isinstance(module, Attention) else ""
                found.append(f"the output of {name or 'the model'}{own}")

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if torch.is_tensor(output):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
