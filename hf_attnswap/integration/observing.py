"""See what the swapped layers of a model are called with, and choose what they answer."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..attentions import Attention, Heads, get
from ..errors import UsageError
from ..masks import Mask
from .swapping import swapped_modules

SOFTMAX = get("softmax")(Heads(1, 1, 1))

# (path of the module, its variant, query, key, value, mask, scaling) -> what the layer answers, `[B, H, T, Dv]`
Answer = Callable[[str, Attention, Tensor, Tensor, Tensor, Mask, float], Tensor]


def own(name, attention, query, key, value, mask, scaling) -> Tensor:
    """Return the answer of the variant itself."""
    return attention(query, key, value, mask, scaling)


def softmax(name, attention, query, key, value, mask, scaling) -> Tensor:
    """Return the answer of the softmax that the variant stands in for."""
    return SOFTMAX(query, key, value, mask, scaling)


@contextmanager
def brought_in(attention: Attention) -> Iterator[None]:
    """Have the weights of a variant in memory while the context is open, where they are offloaded.

    A call of the variant brings them in itself; what else it computes, such as `weights`, does not.
    """
    with ExitStack() as stack:
        for part in attention.modules():
            stack.enter_context(align_module_device(part))
        yield


@contextmanager
def answering(model: nn.Module, answer: Answer) -> Iterator[None]:
    """Let `answer` give the result of every swapped layer while the context is open. Call the model without a cache.

    Raises:
        UsageError: the model has no swapped layer.
    """
    modules = swapped_modules(model)
    if not modules:
        raise UsageError("the model is not swapped: there is nothing to look at")

    with ExitStack() as stack:
        for name, attention in modules.items():
            stack.enter_context(attention.answered_by(partial(answer, name)))
        yield


def allowed_keys(mask: Mask, weights: Tensor) -> Tensor:
    """Return which keys each row may attend to, bool, of the shape of `weights`. Rows of padding may attend to none."""
    allowed = mask.matrix(weights.device).expand_as(weights)
    valid = mask.new_tokens()
    return allowed if valid is None else allowed & valid[:, None, :, None]
