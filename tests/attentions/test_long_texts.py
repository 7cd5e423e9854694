"""Rounding over a text of 16,384 tokens: its size against float64, and that it does not grow along the text.

The float64 result is that of the fast form, which `test_variants.py` holds to the definition.
"""

import copy

import pytest
import torch
from attention_cases import named
from device_under_test import DEVICE

from hf_attnswap import attentions
from hf_attnswap.attentions import Heads
from hf_attnswap.masks import Mask

LENGTH, ROWS = 16384, 1000
# Rounding the result alone to bfloat16 gives 1.7e-3.
ALLOWED = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
# Features that are exp of numbers as large as 26 have an error of 8e-7 each, on any text; a kernel is a product of two.
ABOVE = {("performer", torch.float32): 2e-6}
USUAL = ("elu", "hedgehog+window")  # seconds each
LINEAR = named(lambda cls: cls.cost_class == "linear")


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference, as a share of that of the expected."""
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.long) for n in LINEAR])
def test_rounding_is_small_and_does_not_drift(name, dtype):
    options = {"max_length": LENGTH} if "max_length" in attentions.get(name).options() else {}
    attention = attentions.get(name)(Heads(3, 1, 64), **options).to(DEVICE, dtype)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, heads, LENGTH, 64, generator=generator).to(dtype) for heads in (3, 1, 1)]
    mask = Mask(LENGTH, LENGTH)
    with torch.no_grad():
        found = attention(*given, mask, 0.125)
        expected = copy.deepcopy(attention).double()(*(t.double() for t in given), mask, 0.125)
    assert error(found, expected) <= ABOVE.get((name, dtype), ALLOWED[dtype])
    first, last = (error(found[:, :, rows], expected[:, :, rows]) for rows in (slice(ROWS), slice(-ROWS, None)))
    assert last <= 2 * first
