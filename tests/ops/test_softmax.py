"""Softmax by the CPU kernels: the numbers of torch's SDPA, where it takes the place of SDPA and where it does not."""

import pytest
import torch
from ops.kernels import needs_kernels

from hf_attnswap.masks import Mask
from hf_attnswap.ops import softmax
from hf_attnswap.ops.backends import watch
from hf_attnswap.ops.softmax import softmax_attention

pytestmark = needs_kernels


def given(rows=200, keys=200, dtype=torch.float64):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 16, dtype=dtype).transpose(1, 2) for n, h in ((rows, 6), (keys, 2), (keys, 2)))
    return q, k, v


@pytest.mark.parametrize("padding", (False, True))
@pytest.mark.parametrize("rows", (1, 60, 200))
def test_every_form_gives_the_same(rows, padding):
    q, k, v = (t.requires_grad_() for t in given(rows, 600 if rows == 1 else 200))
    valid = torch.arange(k.shape[2])[None] >= torch.tensor([0, 30])[:, None] if padding else None
    mask = Mask(rows, k.shape[2], valid=valid)
    seen = torch.ones(2, 1, rows, 1, dtype=torch.bool)
    if padding and rows == 200:
        seen[1, :, :30] = False  # rows of padding, which see nothing
    found = []
    for form in (softmax.cpu, softmax.torch, softmax.reference):
        out = form.run(q, k, v, mask, 0.3, 0.0).masked_fill(~seen, 0)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for one, two, three in zip(*found, strict=True):
        torch.testing.assert_close(one, three)
        torch.testing.assert_close(two.nan_to_num(0), three)


@pytest.mark.parametrize(
    "rows, mask, dropout, form",
    (
        (200, Mask(200, 200), 0.0, "cpu"),
        (200, Mask(200, 200), 0.1, "torch"),
        (200, Mask(200, 200, causal=False), 0.0, "torch"),
        (200, Mask(200, 200, dense=torch.ones(1, 1, 200, 200, dtype=torch.bool)), 0.0, "torch"),
        (8, Mask(8, 8), 0.0, "torch"),
        (1, Mask(1, 600), 0.0, "cpu"),
        (1, Mask(1, 100), 0.0, "torch"),
    ),
)
def test_which_form_runs(rows, mask, dropout, form):
    q, k, v = given(rows, mask.key_length)
    with torch.no_grad(), watch() as ran:
        softmax_attention(q, k, v, mask, 0.3, dropout=dropout)
    assert ran == {"softmax": {form}}
