"""What a run says of losses that are not what they should be."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attentions import Attention


def spike(losses: Sequence[float], window: int = 32) -> float | None:
    """How many times its mean over the `window` steps before the last loss is, where it stands out: by six standard
    deviations and by a fifth; None where it does not, or fewer than 16 steps came before."""
    before = losses[-window - 1 : -1]
    if len(before) < 16:
        return None
    mean = statistics.fmean(before)
    if losses[-1] <= max(1.2 * mean, mean + 6 * statistics.stdev(before)):
        return None
    return losses[-1] / mean


def first_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The first weight that is not finite; else the first module, innermost first, whose output is not while `forward`
    runs; None where all are finite."""
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
