"""Run the original model inside the swapped one: softmax in the swapped layers, LoRA off."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..attentions import Attention
from ..integration.observing import answering, softmax
from ..integration.swapping import swapped_modules
from ..masks import Mask

Observe = Callable[[str, Attention, Tensor, Tensor, Tensor, Tensor, Mask, float], None]


@contextmanager
def softmax_flows_on(model: nn.Module, observe: Observe | None = None) -> Iterator[None]:
    """Run softmax in the swapped layers, without gradients, while the context is open.

    Args:
        observe: called with `(layer, variant, softmax's output, query, key, value, mask, scaling)` at each call of a
            layer, detached.

    Raises:
        UsageError: the model has no swapped layer.
    """

    def answer(layer, attention, query, key, value, mask, scaling):
        with torch.no_grad():
            teacher = softmax(layer, attention, query, key, value, mask, scaling)
        if observe is not None:
            observe(layer, attention, teacher, *(t.detach() for t in (query, key, value)), mask, scaling)
        return teacher

    with answering(model, answer):
        yield


@contextmanager
def as_original(model: nn.Module) -> Iterator[None]:
    """Make the model compute what it did before the swap and before LoRA was added, while the context is open.

    The model then computes what the original does only if no weights but those of the variants and of LoRA have been
    trained.
    """
    switched_off = getattr(model, "disable_adapter", None)  # of peft
    with ExitStack() as stack:
        if swapped_modules(model):
            stack.enter_context(softmax_flows_on(model))
        if switched_off is not None:
            stack.enter_context(switched_off())
        yield


def frozen(model: nn.Module) -> nn.Module:
    """Set the model to eval mode without gradients, to be a teacher, and return the model."""
    return model.eval().requires_grad_(False)
