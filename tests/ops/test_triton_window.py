"""The Triton kernels of the window and the hybrid against the float64 definitions, and torch where states are."""

import pytest
import torch
from ops.triton_kernels import assert_near, gradients

from hf_attnswap.attentions.elu import ELU
from hf_attnswap.attentions.hedgehog import hedgehog_beside_softmax, hedgehog_features
from hf_attnswap.ops import hybrid, window
from hf_attnswap.ops.spec import FeatureMap

FORMS = {
    op: {name: form.run for name, form in module._op.forms.items()}
    for op, module in (("window", window), ("hybrid", hybrid))
}
# tokens, D, Dv, window, sinks, padding
CASES = {
    "window": (34, 16, 24, 8, 2, False), "no sinks, padding": (20, 24, 16, 6, 0, True),
    "wide window": (16, 16, 16, 64, 4, False),
}  # fmt: skip


def drawn(length, dim, value_dim, batch=1, heads=2, kv_heads=1, phi="hedgehog", fades=True):
    torch.manual_seed(0)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    leaves = [torch.randn(batch, h, length, d) for h, d in shapes]
    learned = [torch.randn(heads)]
    if phi == "hedgehog":
        learned += [torch.randn(h, dim, dim) / 4 for h in (heads, kv_heads)]
    return leaves, learned + [-torch.rand(kv_heads) / 4] * fades


def called(op, form, leaves, learned, window, sinks, valid=None, state=None, keep=False):
    run = FORMS[op][form]
    if op == "window":
        return run(*leaves, 0.5, window, sinks, valid, state, keep, None)
    mix, *deltas = learned
    log_decay = deltas.pop() if len(deltas) % 2 else None
    maps = [
        FeatureMap("hedgehog", hedgehog_features, tensors={"delta": d}, beside=hedgehog_beside_softmax) for d in deltas
    ]
    return run(*leaves, *(maps or [ELU, ELU]), mix, 0.5, window, sinks, valid, state, keep, None, log_decay)


def numbers(outputs):
    """The tensors of an output and a state."""
    out, state = outputs
    near = state if hasattr(state, "key") else state.window
    return [out, near.key, near.value, near.count.double(), *([] if near is state else [state.linear])]


def check(op, case, dtype, phi="hedgehog", heads=1):
    length, dim, value_dim, near, sinks, padded = case
    leaves, learned = drawn(length, dim, value_dim, heads=heads, phi=phi, fades=padded)
    valid = torch.arange(length)[None] >= 3 if padded else None
    leaves, learned = ([t.to(dtype).requires_grad_() for t in given] for given in (leaves, learned))
    learned = learned if op == "hybrid" else []
    exact = [[t.detach().double().requires_grad_() for t in given] for given in (leaves, learned)]
    ours = called(op, "triton", leaves, learned, near, sinks, valid)[0]
    expected = called(op, "reference", *exact, near, sinks, valid)[0]
    rows = slice(3 if padded else 0, None)
    assert_near([ours[:, :, rows]], [expected[:, :, rows]], dtype, 2)
    of_ours = gradients([ours[:, :, rows]], [*leaves, *learned])
    assert_near(of_ours, gradients([expected[:, :, rows]], [*exact[0], *exact[1]]), dtype, 2)
    with torch.no_grad():
        ours = called(op, "triton", leaves, learned, near, sinks, valid)[0]  # the branches of the hybrid join otherwise
    assert_near([ours[:, :, rows]], [expected[:, :, rows]], dtype, 2)


# Of the hybrid, padding in bfloat16 below.
@pytest.mark.parametrize(
    "op, case",
    [("window", case) for case in CASES]
    + [pytest.param("hybrid", c, marks=[pytest.mark.long] * (c == "no sinks, padding")) for c in CASES],
)
def test_outputs_and_gradients(op, case):
    check(op, CASES[case], torch.float32, heads=2 if case == "wide window" else 1)


def test_bfloat16():
    check("hybrid", CASES["no sinks, padding"], torch.bfloat16)


@pytest.mark.long
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("op, phi", (("window", None), ("hybrid", "hedgehog"), ("hybrid", "elu")))
def test_longer_and_wider(op, phi, dtype):
    check(op, (150, 80, 136, 40, 5, True), dtype, phi, heads=2)


@pytest.mark.parametrize(
    "op, phi", (("window", None), ("hybrid", "hedgehog"), pytest.param("hybrid", "elu", marks=pytest.mark.long))
)
def test_texts_go_on_from_a_state_token_by_token(op, phi):
    """A text in parts, then single tokens, while the window fills and slides; torch's form says what is right."""
    leaves, learned = drawn(16, 12, 20, batch=1, heads=2, kv_heads=1, phi=phi)
    exact = [[t.double() for t in given] for given in (leaves, learned)]
    parts = [slice(0, 1), slice(1, 2), slice(2, 7), slice(7, 8), slice(8, 9)]
    ours = expected = None
    with torch.no_grad():
        for part in parts:
            tokens = [[t[:, :, part] for t in x] for x in (leaves, exact[0])]
            ours = called(op, "triton", tokens[0], learned, 4, 2, None, ours and ours[1], True)
            expected = called(op, "torch", tokens[1], exact[1], 4, 2, None, expected and expected[1], True)
            assert_near(numbers(ours)[:1], numbers(expected)[:1], torch.float32)
        assert_near(numbers(ours)[3:], numbers(expected)[3:], torch.float32)


def test_rows_see_no_later_token():
    leaves, learned = drawn(20, 16, 16, heads=1)
    with torch.no_grad():
        first = called("hybrid", "triton", leaves, learned, 8, 2)[0]
        for leaf in leaves:
            leaf[:, :, 17:] += 1
        second = called("hybrid", "triton", leaves, learned, 8, 2)[0]
    torch.testing.assert_close(first[:, :, :17], second[:, :, :17], rtol=0, atol=0)
