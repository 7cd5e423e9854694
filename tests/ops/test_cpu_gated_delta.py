"""The CPU kernels of gated linear attention and of the delta rules against the token-by-token definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ops.kernels import draw, each_set, needs_kernels, paired, tensors  # noqa: F401
from property_settings import examples

from hf_attnswap.ops.delta import cpu as delta
from hf_attnswap.ops.delta import reference as delta_reference
from hf_attnswap.ops.gated import cpu as gated
from hf_attnswap.ops.gated import reference as gated_reference
from hf_attnswap.ops.gated_delta import cpu as gated_delta
from hf_attnswap.ops.gated_delta import reference as gated_delta_reference

pytestmark = needs_kernels


@pytest.mark.parametrize("seed", range(10))
def test_gated(each_set, seed):  # noqa: F811
    pick, sizes = draw(seed)
    given = tensors(pick, sizes)
    gate = F.logsigmoid(torch.randn(sizes["batch"], sizes["kv_heads"], sizes["length"], dtype=torch.float64))
    leaves = [*given, gate.requires_grad_()]
    state = torch.rand(sizes["batch"], sizes["kv_heads"], sizes["dim"], sizes["value_dim"] + 1, dtype=torch.float64)
    more = (state if pick.random() < 0.5 else None, pick.choice([None, 1e-3]), 64)

    def run(form):
        return form.run(given[0].exp(), given[1].exp(), given[2], gate, *more)

    for ours, expected in paired(lambda: run(gated), lambda: run(gated_reference), leaves):
        torch.testing.assert_close(ours, expected)


def compare(seed, lengths=(0, 1, 2, 8, 16, 17, 33, 70), **sizes):
    """Both delta rules, with and without a state: outputs, states and gradients."""
    pick, drawn = draw(seed, lengths)
    sizes = drawn | sizes
    leaves = tensors(pick, sizes)
    numbers = torch.rand(2, sizes["batch"], sizes["kv_heads"], sizes["length"] + 1, dtype=torch.float64)
    leaves += [n[..., 1:].requires_grad_() for n in (numbers[0], numbers[1].log())]
    state = torch.rand(sizes["batch"], sizes["kv_heads"], sizes["dim"], sizes["value_dim"], dtype=torch.float64)
    state = state if pick.random() < 0.5 else None

    def run(form, gate):
        q, k, v, beta, log_gate = leaves
        q, k = (F.normalize(t, dim=-1) for t in (q, k))
        return form.run(q, k, v, beta, *([log_gate] if gate else []), state, 64)

    for gate, forms in ((False, (delta, delta_reference)), (True, (gated_delta, gated_delta_reference))):
        ours, expected = (lambda form=form: run(form, gate) for form in forms)  # noqa: B023
        for x, y in paired(ours, expected, leaves):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)
        with torch.no_grad():
            for x, y in zip(ours(), expected(), strict=True):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("seed", range(10))
def test_delta(each_set, seed):  # noqa: F811
    compare(seed)


@pytest.mark.drawn
@examples(6)
@given(
    seed=st.integers(0, 10**6), length=st.integers(0, 20), dim=st.integers(1, 256), value_dim=st.integers(1, 256),
    group=st.integers(1, 9),
)  # fmt: skip
def test_delta_of_any_size(seed, length, dim, value_dim, group):
    compare(seed, length=length, dim=dim, value_dim=value_dim, heads=group, kv_heads=1, batch=1)


@pytest.mark.parametrize("gate", (False, True))
def test_delta_in_pieces_and_in_other_dtypes(gate):
    """Errors against float64, of a text in one piece and token by token."""
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(1, h, 300, 24), dim=-1) for h in (6, 2))
    given = [q, k, torch.randn(1, 2, 300, 16), torch.rand(1, 2, 300)]
    given += [F.logsigmoid(torch.randn(1, 2, 300) + 3)] if gate else []
    form, reference = (gated_delta, gated_delta_reference) if gate else (delta, delta_reference)
    with torch.no_grad():
        exact, after = reference.run(*(t.double() for t in given), None, 64)
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
            out, state = form.run(*(t.to(dtype) for t in given), None, 64)
            assert out.dtype == dtype and state.dtype == torch.float32
            assert (out.double() - exact).norm() / exact.norm() < tolerance
        state = None
        for i in range(300):
            out, state = form.run(*(t[:, :, i : i + 1] for t in given), state, 64)
            assert (out.double() - exact[:, :, i : i + 1]).abs().max() < 1e-5
        torch.testing.assert_close(state.double(), after, rtol=1e-4, atol=1e-5)


def test_what_is_no_number_comes_through_from_its_token_on():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 20, 8, dtype=torch.float64) for h in (3, 1, 1))
    numbers = torch.rand(2, 1, 1, 20, dtype=torch.float64)
    v[0, 0, 9, 1] = float("nan")
    out, _ = gated_delta.run(q, k, v, numbers[0], numbers[1].log(), None, 64)
    expected, _ = gated_delta_reference.run(q, k, v, numbers[0], numbers[1].log(), None, 64)
    assert torch.equal(out.isnan(), expected.isnan())


def test_a_gate_that_is_shut_forgets_all_and_has_a_gradient():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 20, 8, dtype=torch.float64) / 3 for h in (3, 1, 1))
    beta, gate = torch.rand(1, 1, 20, dtype=torch.float64), torch.zeros(1, 1, 20, dtype=torch.float64)
    gate[..., 11] = -800
    leaves = [t.requires_grad_() for t in (q, k, v, beta, gate)]
    runs = [lambda form=form: form.run(*leaves, None, 64) for form in (gated_delta, gated_delta_reference)]
    for ours, expected in paired(*runs, leaves):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_threads_give_the_same():
    torch.manual_seed(0)
    leaves = [torch.randn(1, h, 50, 64).mul_(0.1).requires_grad_() for h in (2, 2, 2)] + [torch.rand(1, 2, 50)]
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            out = delta.run(*leaves, None, 64)[0]
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves[:3])])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("gate", (False, True))
def test_torch_knows_the_operator(gate):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 5, 8, requires_grad=True) for h in (2, 1, 1))
    numbers = [torch.rand(1, 1, 5).requires_grad_() for _ in range(1 + gate)]
    given = (q, k, v, *numbers, *([] if gate else [None]), None)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(delta.forward, given, test_utils=checks)
