"""No input makes a variant give NaN or infinity: shapes, masks and magnitudes drawn at random."""

import pytest
import torch
from attention_cases import KINDS, SCALING, WITH_OPTIONS, build, case_id, causal, inputs, named
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from hf_attnswap.masks import Mask

pytestmark = pytest.mark.drawn
modest = examples(5, tests=500)
# Of query, key and value.
MAGNITUDES = {
    "usual": st.just((1.0, 1.0, 1.0)),
    "large": st.tuples(st.just(1e4), st.just(1e4), st.sampled_from((1.0, 1e4))),
    "mixed": st.tuples(*[st.sampled_from((0.0, 1e-30, 1e-4, 30.0, 1e4))] * 3),
}
DENSE = named(lambda cls: cls.any_mask)

every_magnitude = pytest.mark.parametrize("magnitude", MAGNITUDES)


@st.composite
def texts(draw, magnitude: str):
    """Query, key and value of some magnitude, in float32 or bfloat16, and which tokens are not padding."""
    heads, kv_heads = draw(st.sampled_from(((1, 1), (2, 2), (4, 2), (3, 1))))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 140))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
    drawn = inputs(length, heads, kv_heads, batch, dtype, seed=draw(st.integers(0, 2**16)))
    factors = draw(MAGNITUDES[magnitude])
    tensors = [(t.detach() * f).clamp(-1e4, 1e4).requires_grad_() for t, f in zip(drawn, factors, strict=True)]
    valid = torch.rand(batch, length, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**16))))
    return tensors, valid < draw(st.sampled_from((0.0, 0.02, 0.5, 1.0)))


def check_finite(attention, tensors, mask: Mask) -> None:
    """The output, and the gradients of the sum of all its rows, those of padding included."""
    out = attention(*tensors, mask, SCALING)
    assert out.isfinite().all(), f"output has {(~out.isfinite()).sum()} of {out.numel()} entries that are not finite"
    wanted = {name: t for name, t in zip(("query", "key", "value"), tensors, strict=True)}
    wanted |= dict(attention.named_parameters())
    grads = torch.autograd.grad(out.float().sum(), list(wanted.values()), allow_unused=True)
    for name, grad in zip(wanted, grads, strict=True):
        assert grad is None or grad.isfinite().all(), f"the gradient of {name} is not finite"


def build_like(name, tensors, **options):
    query, key, _ = tensors
    return build(name, query.shape[1], key.shape[1], query.dtype, **options)


@every_magnitude
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_finite(name, kind, magnitude):
    @modest
    @given(texts(magnitude))
    def check(text):
        (query, key, value), valid = text
        keys = valid.shape[1]
        if kind == "cross":
            query = query[:, :, : keys // 2 + 1].detach().requires_grad_()
        tensors = query, key, value
        check_finite(build_like(name, tensors), tensors, Mask(query.shape[2], keys, valid, causal=kind == "causal"))

    check()


@every_magnitude
@pytest.mark.parametrize(("name", "options"), WITH_OPTIONS, ids=case_id)
def test_finite_with_other_options(name, options, magnitude):
    @modest
    @given(texts(magnitude))
    def check(text):
        tensors, valid = text
        check_finite(build_like(name, tensors, **options), tensors, causal(valid.shape[1], valid))

    check()


@every_magnitude
@pytest.mark.parametrize("name", DENSE)
def test_finite_with_any_mask(name, magnitude):
    @modest
    @given(texts(magnitude), st.sampled_from((0.0, 0.02, 0.5)), st.integers(0, 2**16))
    def check(text, density, seed):
        tensors, valid = text
        batch, length = valid.shape
        drawn = torch.rand(batch, 1, length, length, generator=torch.Generator().manual_seed(seed))
        check_finite(build_like(name, tensors), tensors, Mask(length, length, dense=drawn < density))

    check()


@every_magnitude
@pytest.mark.parametrize("name", named(lambda cls: cls.stateful))
def test_finite_when_continued(name, magnitude):
    @modest
    @given(texts(magnitude), st.integers(1, 139))
    def check(text, cut):
        tensors, valid = text
        length = valid.shape[1]
        cut = min(cut, length)
        attention, state = build_like(name, tensors), {}
        with torch.no_grad():
            for start, stop in ((0, cut), (cut, length)):
                if start < stop:
                    mask = Mask(stop - start, stop, valid=valid[:, :stop])
                    out = attention(*(t[:, :, start:stop] for t in tensors), mask, SCALING, state)
                    assert out.isfinite().all()
            assert all(t.isfinite().all() for t in state.values())

    check()
