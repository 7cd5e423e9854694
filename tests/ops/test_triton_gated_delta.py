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
CASES = {"two chunks": (34, 16, 20, 1, False), "a state": (18, 12, 16, 2, True)}
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", FORMS)
def test_outputs_states_and_gradients(op, case):
    without_gradients = check(op, CASES[case], torch.float32)
    with torch.no_grad():
        without_gradients()
