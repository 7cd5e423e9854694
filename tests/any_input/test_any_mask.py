"""Masks that users hand to a swapped model: of any shape, dtype and content they are honoured, or refused."""

import pytest
import torch
from hypothesis import strategies as st
from refusals import EXAMPLES, answered, every
from tiny_models import tiny

import hf_attnswap

VARIANTS = ("relu", "sigmoid", "elu", "hedgehog+window", "window", "gated", "delta", "softmax")
DTYPES = (
    torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.complex64,
)  # fmt: skip
BATCH, LENGTH = 2, 6
SIZES = (0, 1, 2, 3, 4, 5, 6, 7, 12)
SHAPES = ((BATCH, LENGTH), (BATCH, 1, LENGTH, LENGTH), (1, 1, LENGTH, LENGTH), (BATCH, 4, LENGTH, LENGTH))


@st.composite
def masks(draw):
    """A tensor: right in its shape, or wrong in one size, or of any shape."""
    shape = list(draw(st.sampled_from(SHAPES)))
    what = draw(st.sampled_from(("right", "size", "any")))
    if what == "size":
        shape[draw(st.sampled_from(range(len(shape))))] = draw(st.sampled_from(SIZES))
    elif what == "any":
        shape = draw(st.lists(st.sampled_from(SIZES), max_size=5))
    dtype = draw(st.sampled_from(DTYPES))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    content = draw(st.sampled_from(("ones", "zeros", "holes", "causal", "left", "additive", "bias", "nan", "infinite")))
    if content in ("ones", "zeros"):
        mask = torch.full_like(mask, float(content == "ones"))
    elif content == "holes":
        mask = (mask > 0.3).float()
    elif content == "causal" and len(shape) > 1:
        mask = torch.ones(shape).tril()
    elif content == "left" and shape:
        mask = (torch.arange(shape[-1]) > 1).float().expand(shape).clone()
    elif content == "additive":
        mask = torch.where(mask > 0.5, 0.0, -3e38)
    elif content in ("nan", "infinite") and mask.numel():
        mask.view(-1)[0] = {"nan": float("nan"), "infinite": float("inf")}[content]
    return mask.to(dtype)


@pytest.fixture(scope="module")
def swapped() -> dict[str, torch.nn.Module]:
    return {name: hf_attnswap.swap(tiny(), name) for name in VARIANTS}


@pytest.mark.drawn
@EXAMPLES
def test_masks(examples, swapped):
    ids = torch.randint(3, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def check(drawn):
        name, mask, cached = drawn
        given, past = ids, None
        if cached:
            past = swapped[name](ids[:, :2], use_cache=True).past_key_values
            given = ids[:, 2:]
        out = answered(swapped[name], given, attention_mask=mask, past_key_values=past)
        assert out is None or out.logits.shape[:2] == given.shape and out.logits.isfinite().all()

    every(examples, st.tuples(st.sampled_from(VARIANTS), masks(), st.booleans()), check)
