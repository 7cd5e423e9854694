"""Leave the attention of a swapped model out while it is counted: what stands in for it has shapes alone.

What attention costs is known from its variant (`Attention.operations`), and depends on the kernel that computes it; all
else of a model is counted by running it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..attentions import Attention
from ..integration import attention as calling
from ..integration import observing
from ..integration.swapping import swapped_modules
from ..masks import Mask


class _Shapes(torch.autograd.Function):
    """Give the shape of attention, and keep for the backward pass what its kernels keep: the inputs and the output."""

    @staticmethod
    def forward(ctx, query, key, value, *parameters):
        out = query.new_empty(*query.shape[:3], value.shape[3])
        ctx.save_for_backward(query, key, value, out, *parameters)
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _, *parameters = ctx.saved_tensors
        return tuple(torch.empty_like(t) for t in (query, key, value, *parameters))


@contextmanager
def standing_in(model: nn.Module) -> Iterator[None]:
    """Let every attention of a swapped model, and of the softmax beside it, give shapes alone."""
    variants = list(swapped_modules(model).values())
    branches = [variant.linear_branch for variant in variants]
    softmaxes = [calling._SOFTMAX, observing.SOFTMAX]
    standing = [one for one in (*variants, *branches, *softmaxes) if one is not None]
    read_mask = calling.read_mask
    for one in standing:
        one.forward = _instead_of(one)
    calling.read_mask = _whole_texts
    try:
        yield
    finally:
        calling.read_mask = read_mask
        for one in standing:
            one.__dict__.pop("forward", None)


def _whole_texts(module, attention, query, key, attention_mask, layer, kwargs) -> Mask:
    """Return the mask of texts without padding: on the meta device, that of a call has no values to be read."""
    return Mask(query.shape[2], key.shape[2], causal=attention.kind == "causal")


def _instead_of(attention: Attention):
    parameters = tuple(attention.parameters())

    def forward(query, key, value, mask, scaling, state=None, **more):
        return _Shapes.apply(query, key, value, *parameters)

    return forward
