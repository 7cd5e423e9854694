"""Gates: a number per key/value group that mixes softmax with what would take its place, and the loss by these numbers.

One backward pass tells for every group at once what the loss gains by softmax there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..integration.observing import answering, own, softmax
from ..integration.swapping import restore, swap
from .groups import Groups, by_heads
from .losses import Text, answer, distance


@contextmanager
def swapped_everywhere(model: PreTrainedModel, groups: Groups) -> Iterator[None]:
    """Swap every candidate of `model` while the context is open, with its weights frozen."""
    training = [p for p in model.parameters() if p.requires_grad]
    swap(model, groups.config(()))
    model.requires_grad_(False)
    try:
        yield
    finally:
        restore(model)
        for parameter in training:
            parameter.requires_grad_(True)


@contextmanager
def gated(model: nn.Module, groups: Groups, gates: Tensor) -> Iterator[None]:
    """Let each group of a model that is swapped everywhere answer `g softmax + (1 - g) variant`.

    Args:
        gates: one number per candidate, float32 `[n]`.
    """
    layers = {layer.path: layer for layer in groups.layers}

    def mixed(name, attention, query, key, value, mask, scaling) -> Tensor:
        g = by_heads(gates, layers[name]).to(query)
        given = (name, attention, query, key, value, mask, scaling)
        return torch.lerp(own(*given), softmax(*given), g)

    with answering(model, mixed):
        yield


def gradient(model: nn.Module, groups: Groups, gates: Tensor, text: Text) -> tuple[float, Tensor]:
    """Return the loss of one text at these gates, and its gradient by them, float64 `[n]`.

    Cost: two forward passes and a backward one that goes through the activations alone.

    Args:
        model: swapped everywhere.
        gates: one number per candidate, `[n]`.
    """
    device = next(model.parameters()).device
    gates = gates.detach().to(device, torch.float32).requires_grad_()
    with answering(model, softmax), torch.no_grad():
        wanted = answer(model, text)
    with gated(model, groups, gates), torch.enable_grad():
        lost = distance(wanted, answer(model, text), text)
        (found,) = torch.autograd.grad(lost, gates)
    return lost.item(), found.double().cpu()
