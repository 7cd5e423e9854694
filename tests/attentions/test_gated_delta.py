"""The recurrences with a gate: their definitions against the literal recurrence, and their operations."""

import math

import pytest
import torch
from attention_cases import NAMES, PADDINGS, SCALING, assert_near, build, causal, inputs, valid_keys
from device_under_test import DEVICE

from hf_attnswap import attentions
from hf_attnswap.attentions import Heads
from hf_attnswap.ops.delta import causal_delta
from hf_attnswap.ops.gated import causal_gated
from hf_attnswap.ops.gated_delta import causal_gated_delta
from hf_attnswap.ops.linear import causal_linear
from hf_attnswap.ops.spec import FeatureMap


def gated_by_token(attention, query, key, value):
    """One head of one text, `[n, D]`, without padding: the formula as it is written."""
    S, z, out = 0, 0, []
    for g, phi_q, phi_k, v in zip(
        attention.log_gate(key[None, None])[0, 0].exp(),
        attention.feature_map(query),
        attention.feature_map(key),
        value,
        strict=True,
    ):
        S, z = g * S + torch.outer(phi_k, v), g * z + phi_k
        out.append(phi_q @ S / (phi_q @ z + attention.eps))
    return torch.stack(out)


def delta_by_token(attention, query, key, value):
    S, out = value.new_zeros(value.shape[1], key.shape[1]), []
    for beta, q, k, v in zip(
        attention.beta(key[None, None])[0, 0],
        attention.feature_map(query),
        attention.feature_map(key),
        value,
        strict=True,
    ):
        S = S @ (torch.eye(len(k)) - beta * torch.outer(k, k)) + beta * torch.outer(v, k)
        out.append(S @ q)
    return torch.stack(out)


def gated_delta_by_token(attention, query, key, value):
    S, out = value.new_zeros(value.shape[1], key.shape[1]), []
    for g, beta, q, k, v in zip(
        attention.log_gate(key[None, None])[0, 0].exp(),
        attention.beta(key[None, None])[0, 0],
        attention.feature_map(query),
        attention.feature_map(key),
        value,
        strict=True,
    ):
        S = g * S @ (torch.eye(len(k)) - beta * torch.outer(k, k)) + beta * torch.outer(v, k)
        out.append(S @ q)
    return torch.stack(out)


BY_TOKEN = {"gated": gated_by_token, "delta": delta_by_token, "gated_delta": gated_delta_by_token}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", BY_TOKEN)
def test_definition_is_the_recurrence(name, padding):
    n = 20
    attention, given, valid = build(name, 2, 1), inputs(n, 2, 1), valid_keys(padding, n)
    with torch.no_grad():
        out = attention.reference(*given, causal(n, valid), SCALING)
        for text in range(2):
            rows = slice(None) if valid is None else valid[text]
            for head in range(2):
                query, key, value = given.query[text, head, rows], given.key[text, 0, rows], given.value[text, 0, rows]
                assert_near(out[text, head, rows], BY_TOKEN[name](attention, query, key, value), 1e-12, "output")


def test_they_start_as_retnet_and_with_half_a_step():
    key = torch.randn(1, 5, 3, 8, dtype=torch.float64)
    made = {name: attentions.get(name)(Heads(10, 5, 8)).to(DEVICE).double() for name in BY_TOKEN}
    expected = torch.tensor([1 / 32, 1 / 64, 1 / 128, 1 / 256, 1 / 512], dtype=torch.float64)
    for name in ("gated", "gated_delta"):
        forgotten = 1 - made[name].log_gate(key).exp()
        torch.testing.assert_close(forgotten, expected[:, None].expand(1, 5, 3))
    for name in ("delta", "gated_delta"):
        assert (made[name].beta(key) == 0.5).all()


@pytest.mark.parametrize("name", BY_TOKEN)
def test_they_are_for_causal_attention_alone(name):
    assert attentions.get(name).kinds == ("causal",) and f"{name}+window" not in NAMES


def small(length, heads=2):
    """query, key, value and a gate in (0, 1), for gradcheck."""
    torch.manual_seed(length)
    made = [torch.randn(1, h, length, 2, dtype=torch.float64, requires_grad=True) for h in (heads, 1, 1)]
    return [*made, torch.rand(1, 1, length, dtype=torch.float64, requires_grad=True)]


@pytest.mark.parametrize("continued", (False, True), ids=("start", "continued"))
@pytest.mark.parametrize("length", (1, 2, 3, 4, 7))
@pytest.mark.parametrize("eps", (None, 1e-6))
def test_gradcheck_of_causal_gated(eps, length, continued):
    """Chunks of 3; also through the denominator that comes back."""
    state = torch.rand(1, 1, 2, 3, dtype=torch.float64) if continued else None

    def run(query, key, value, gate):
        return causal_gated(query.exp(), key.exp(), value, gate.log(), state=state, eps=eps, chunk=3)[:2]

    assert torch.autograd.gradcheck(run, small(length))


@pytest.mark.parametrize("continued", (False, True), ids=("start", "continued"))
@pytest.mark.parametrize("length", (1, 2, 3, 4, 7))
def test_gradcheck_of_causal_delta(length, continued):
    state = torch.rand(1, 1, 2, 2, dtype=torch.float64) if continued else None

    def run(query, key, value, gate):
        return causal_delta(query, key, value, gate, state=state, chunk=3)[0]

    assert torch.autograd.gradcheck(run, small(length))


def test_a_gate_of_one_is_the_delta_rule():
    query, key, value = (t.detach().abs() for t in inputs(150, 6, 2))
    key, beta = key / key.norm(dim=-1, keepdim=True), value.mean(-1).sigmoid()
    expected = causal_delta(query, key, value, beta)
    found = causal_gated_delta(query, key, value, beta, torch.zeros_like(beta))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_gate_of_one_is_linear_attention():
    query, key, value = (t.detach().abs() for t in inputs(150, 6, 2))
    expected = causal_linear(query, key, value, *[FeatureMap("identity", lambda x: x)] * 2)
    found = causal_gated(query, key, value, key.new_zeros(key.shape[:3]))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_a_gate_of_zero_forgets_all_that_came_before(dtype):
    query, key, value = (t.detach().abs().requires_grad_() for t in inputs(150, 6, 2, dtype=dtype))
    log_gate = key.new_zeros(key.shape[:3])
    log_gate[:, :, 70] = -math.inf
    log_gate.requires_grad_()
    out, denominator, state = causal_gated(query, key, value, log_gate)
    after = slice(70, None)
    alone = causal_gated(*(t[:, :, after] for t in (query, key, value)), torch.zeros_like(log_gate[:, :, after]))
    torch.testing.assert_close(out[:, :, after], alone[0])
    torch.testing.assert_close(state, alone[2])
    for grad in torch.autograd.grad(out.sum() + denominator.sum(), (query, key, value, log_gate)):
        assert grad.isfinite().all()


def test_a_gate_near_zero_costs_the_tokens_around_it_no_digits():
    """As a difference of two sums over the chunk, the short decays behind e^-10000 would be off by a thousandth."""
    query, key, value = (t.detach().abs() for t in inputs(60, dtype=torch.float32))
    log_gate = torch.full(key.shape[:3], -0.01)
    log_gate[:, :, 5] = -1e4
    expected = causal_gated(query.double(), key.double(), value.double(), log_gate.double())[0]
    assert_near(causal_gated(query, key, value, log_gate)[0], expected, 2e-6, "output")


def test_beta_of_one_overwrites_and_beta_of_zero_changes_nothing():
    """Keys e_0, e_1, e_0, e_1: what is read with e_0 after them is what the third token wrote, and so on."""
    key = torch.eye(2, dtype=torch.float64).repeat(2, 1)[None, None]
    value, query = torch.randn(1, 1, 4, 3, dtype=torch.float64), key
    out, state = causal_delta(query, key, value, torch.ones(1, 1, 4, dtype=torch.float64))
    torch.testing.assert_close(out, value)
    torch.testing.assert_close(state[0, 0], value[0, 0, 2:])
    again, unchanged = causal_delta(query, 5 * key, value, torch.zeros(1, 1, 4, dtype=torch.float64), state=state)
    torch.testing.assert_close(unchanged, state, rtol=0, atol=0)
    torch.testing.assert_close(again, value[:, :, [2, 3, 2, 3]])


def test_equal_keys_are_exact_in_float32():
    """The worst case of the triangular system: a power series of its matrix would lose every digit."""
    query, key, value = (t.detach() for t in inputs(128, dtype=torch.float32))
    query, key = (torch.nn.functional.normalize(t[:, :, :1].expand_as(t), dim=-1) for t in (query, key))
    beta = torch.ones(key.shape[:3])
    expected = causal_delta(query.double(), key.double(), value.double(), beta.double())[0]
    assert_near(causal_delta(query, key, value, beta)[0], expected, 1e-5, "output")


@pytest.mark.parametrize("name", BY_TOKEN)
def test_what_is_kept_for_the_gradient_grows_with_n(name):
    attention, kept = build(name, 2, 1), []
    for n in (512, 1024):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t
        ):
            out = attention(*inputs(n, 2, 1, batch=1), causal(n), SCALING)
        kept.append(sum(t.untyped_storage().nbytes() for t in saved.values()) / n)
        del out
    assert kept[1] == pytest.approx(kept[0], rel=0.01)


@pytest.mark.parametrize("chunk", (0, -1))
@pytest.mark.parametrize("operation", (causal_gated, causal_delta))
def test_they_refuse_a_chunk_of_no_tokens(operation, chunk):
    with pytest.raises(ValueError, match=f"chunk must be at least 1, got {chunk}"):
        operation(*small(4), chunk=chunk)
