"""What torch.func makes of a variant: gradients of each sample."""

import pytest
import torch
from attention_cases import KINDS, SCALING, build, gradients, inputs, mask_of, small_options
from torch.func import grad, vmap

from hf_attnswap.masks import Mask

LENGTH = 70  # more than one chunk


@pytest.mark.parametrize("padding", ("none", "left"))
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_gradients_of_each_sample(name, kind, padding):
    attention, mask = build(name, 4, 2, **small_options(name)), mask_of(kind, LENGTH, padding)
    sample = inputs(LENGTH, 4, 2, key_length=mask.key_length)

    def answer(query, key, value, valid):
        one = Mask(mask.query_length, mask.key_length, None if valid is None else valid[None], causal=mask.causal)
        return attention(query[None], key[None], value[None], one, SCALING)[0]

    rows = mask.new_tokens()
    weight = torch.randn(2, 4, LENGTH, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss(query, key, value, valid, weight, rows):
        out = answer(query, key, value, valid) * weight
        return (out if rows is None else out * rows[None, :, None]).sum()

    given = (*(t.detach() for t in sample), mask.valid, weight, rows)
    found = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=tuple(None if t is None else 0 for t in given))(*given)
    expected = gradients(attention(*sample, mask, SCALING), list(sample), rows)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
