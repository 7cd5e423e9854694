"""The Triton kernels of gated linear attention and of the delta rules against the float64 definitions."""

import pytest
import torch
import torch.nn.functional as F
from ops.triton_kernels import assert_near, gradients

from hf_attnswap.ops.delta import reference as delta_reference
from hf_attnswap.ops.delta import triton as delta
from hf_attnswap.ops.gated import reference as gated_reference
from hf_attnswap.ops.gated import triton as gated
from hf_attnswap.ops.gated_delta import reference as gated_delta_reference
from hf_attnswap.ops.gated_delta import triton as gated_delta

FORMS = {
    "gated": (gated, gated_reference),
    "delta": (delta, delta_reference),
    "gated_delta": (gated_delta, gated_delta_reference),
}
# tokens, D, Dv, query heads per key/value head, state
CASES = {
    ("gated", "two chunks"): (34, 16, 16, 1, False),
    ("gated", "a state"): (18, 12, 20, 2, True),
    ("delta", "two chunks"): (18, 16, 16, 1, False),
    ("gated_delta", "a state"): (20, 12, 20, 2, True),
}
MORE = {"long": (300, 24, 40, 3, True), "wide": (40, 136, 72, 1, True), "256": (33, 256, 256, 1, False)}


def drawn(op, case, dtype, batch=1, kv_heads=1):
    """A function that runs a form of an op, and the tensors that want gradients."""
    length, dim, value_dim, group, state = case
    torch.manual_seed(0)
    heads = group * kv_heads
    q, k, v = (torch.randn(batch, h, length, d) for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim)))
    if op == "gated":
        q, k = q.exp(), k.exp()
    else:
        k[:, :, 3:12] = k[:, :, 3:4]  # the same key again and again
        q, k = (F.normalize(t, dim=-1) for t in (q, k))
    leaves = [q.to(dtype), k.to(dtype), v.to(dtype)]
    numbers = torch.rand(2, batch, kv_heads, length)
    numbers[..., length // 2] = 1.0  # a token that overwrites all, and one that keeps all
    numbers[..., length // 3] = 0.0  # one that leaves no trace; a gate of 0 follows
    beta, log_gate = numbers[0], (numbers[1] * 0.9 + 0.1).log()
    log_gate[..., length // 3] = -200.0
    leaves += [] if op == "gated" else [beta]
    leaves += [] if op == "delta" else [log_gate]
    before = torch.rand(batch, kv_heads, dim, value_dim + (op == "gated")) if state else None
    eps = [1e-6] if op == "gated" else []

    def run(form, leaves, before):
        return form.run(*leaves, before, *eps, 64)

    return run, [t.requires_grad_() for t in leaves], before


def check(op, case, dtype):
    run, leaves, before = drawn(op, case, dtype)
    form, reference = FORMS[op]
    ours = run(form, leaves, before)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = run(reference, exact, None if before is None else before.double())
    assert ours[0].dtype == dtype and not ours[-1].requires_grad
    assert_near(ours, expected, dtype, 2)
    assert_near(gradients(ours[:-1], leaves), gradients(expected[:-1], exact), dtype, 2)
    return lambda: assert_near(run(form, leaves, before), expected, dtype, 2)


@pytest.mark.parametrize("op, case", CASES)
def test_outputs_states_and_gradients(op, case):
    without_gradients = check(op, CASES[op, case], torch.float32)
    if case == "a state":
        with torch.no_grad():
            without_gradients()


@pytest.mark.parametrize("op, dtype", (("gated", torch.bfloat16), ("gated_delta", torch.float16)))
def test_short_numbers(op, dtype):
    check(op, (17, 16, 16, 1, False), dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("case", MORE)
@pytest.mark.parametrize("op", FORMS)
def test_longer_and_wider(op, case, dtype):
    check(op, MORE[case], dtype)


@pytest.mark.parametrize("op", FORMS)
def test_a_token_after_a_state(op):
    run, leaves, before = drawn(op, (1, 24, 40, 2, True), torch.float32, batch=2, kv_heads=2)
    kept = before.clone()
    with torch.no_grad():
        ours = run(FORMS[op][0], leaves, before)
        expected = run(FORMS[op][1], [t.double() for t in leaves], before.double())
    assert_near(ours, expected, torch.float32)
    assert torch.equal(before, kept)  # what a caller holds is left as it is


def test_rows_see_no_later_token_and_padding_leaves_no_trace():
    op = "gated_delta"
    run, leaves, _ = drawn(op, (20, 16, 16, 1, False), torch.float32)
    with torch.no_grad():
        first = run(FORMS[op][0], leaves, None)
        for leaf in leaves[:3]:
            leaf[:, :, 17:] += 1
        leaves[1][:, :, 17:] = 0
        for leaf in leaves[3:]:
            leaf[:, :, 17:] = 0
        second = run(FORMS[op][0], leaves, None)
        alone = run(FORMS[op][0], [t[:, :, :17] for t in leaves], None)
    assert torch.equal(first[0][:, :, :17], second[0][:, :, :17])
    assert_near([second[-1]], [alone[-1]], torch.float32)
    assert not torch.equal(first[-1], second[-1])


def test_features_in_float32_beside_values_in_bfloat16():
    """As the variants hand them over in a model in bfloat16."""
    run, leaves, _ = drawn("gated", (16, 16, 16, 1, False), torch.float32)
    leaves[2] = leaves[2].detach().bfloat16().requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    ours, expected = (run(form, given, None) for form, given in zip(FORMS["gated"], (leaves, exact), strict=True))
    assert ours[0].dtype == torch.float32
    assert_near(ours, expected, torch.bfloat16, 2)
    grads = gradients(ours[:1], leaves)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]
    assert_near(grads, gradients(expected[:1], exact), torch.bfloat16, 2)


@pytest.mark.parametrize("op", ("delta", "gated_delta"))
def test_wide_heads_in_float32_are_left_to_the_next_form(op):
    for dtype, refused in ((torch.float32, True), (torch.bfloat16, False)):
        _, leaves, _ = drawn(op, (2, 136, 16, 1, False), dtype)
        reason = FORMS[op][0].unfit(*leaves, None, 64)
        assert reason == ("heads are 136 wide, in float32 the kernels take 128" if refused else None)
