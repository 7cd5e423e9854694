"""Both implementations of causal linear attention, and the gradient of blocked scores, against float64 definitions."""

import math

import pytest
import torch
from device_under_test import DEVICE

from hf_attnswap import attentions
from hf_attnswap.attentions import Heads
from hf_attnswap.masks import Mask
from hf_attnswap.ops.linear import reference as by_formula
from hf_attnswap.ops.linear.torch import at_once
from hf_attnswap.ops.scores.torch import by_blocks
from hf_attnswap.ops.spec import FeatureMap


def inputs(length: int):
    torch.manual_seed(length)
    return [torch.randn(2, h, length, d, dtype=torch.float64, requires_grad=True) for h, d in ((6, 4), (2, 4), (2, 3))]


@pytest.mark.parametrize("length", (1, 7, 8, 9, 70))
@pytest.mark.parametrize("eps", (1e-6, None))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("half_life", (None, 5.0))
def test_all_chunks_at_once(length, eps, masked, half_life):
    weight = torch.rand(4, 4, dtype=torch.float64, requires_grad=True)
    key_mask = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    state = torch.rand(2, 2, 4, 4, dtype=torch.float64)
    found = []
    phi = FeatureMap("of this test", lambda x, weight: (x @ weight).sigmoid(), tensors={"weight": weight})
    half_lives = None if half_life is None else torch.tensor([half_life, 1.0], dtype=torch.float64).requires_grad_()
    for form, more in ((at_once, ()), (by_formula.run, (True,))):
        tensors = [*inputs(length), weight, *([] if half_lives is None else [half_lives])]
        log_decay = None if half_lives is None else -math.log(2) / half_lives
        out, den, after = form(*tensors[:3], phi, phi, 0.5, key_mask, state, eps, 8, *more, log_decay)
        grads = torch.autograd.grad(out.square().sum() + den.sum(), tensors)
        found.append([out, den, after, *grads])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("name", ("relu_norm", "sigmoid", "softplus"))
def test_gradient_of_blocked_scores(name):
    """Long enough for several blocks of rows and of keys, and no multiple of them."""
    attention = attentions.get(name)(Heads(2, 1, 4)).to(DEVICE).double()
    length, found = 600, []

    def blocked(query, key, value, mask, scaling):
        return by_blocks(query, key, value, mask, scaling, attention.activation(), None, query.dtype)

    for form in (blocked, attention.reference):
        torch.manual_seed(0)
        tensors = [torch.randn(1, h, length, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1)]
        out = form(*tensors, Mask(length, length), 0.5)
        sources = [*tensors, *attention.parameters()]
        found.append([out, *torch.autograd.grad(out.square().sum(), sources)])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference)
