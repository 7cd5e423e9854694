"""The Triton kernels of linear attention against the float64 definition."""

import pytest
import torch
from ops.triton_kernels import assert_near, gradients

from hf_attnswap.attentions.elu import ELU
from hf_attnswap.attentions.hedgehog import hedgehog_features
from hf_attnswap.attentions.identity import IDENTITY
from hf_attnswap.attentions.relu_kernel import RELU
from hf_attnswap.ops.linear import reference
from hf_attnswap.ops.linear import triton as form
from hf_attnswap.ops.spec import FeatureMap

SOFT = FeatureMap("softmax", lambda x: x.softmax(-1))
MAPS = {"elu": ELU, "relu": RELU, "identity": IDENTITY, "softmax": SOFT}
# name, tokens, D, Dv, eps, mask, state, and whether the state fades
CASES = {
    "elu": ("elu", 36, 16, 20, 1e-6, False, False),
    "elu with a state and padding": ("elu", 20, 24, 16, 1e-6, True, True),
    "relu undivided": ("relu", 18, 16, 16, None, True, True),
    "identity": ("identity", 16, 40, 16, None, False, True),
    "hedgehog": ("hedgehog", 18, 16, 16, 1e-6, False, False),
    "hedgehog with a state and padding": ("hedgehog", 16, 12, 16, 1e-6, True, True),
    "features of torch": ("softmax", 16, 16, 16, 1e-6, True, False),
    "a decay": ("elu", 34, 16, 20, 1e-6, False, False, True),
    "a decay with a state and padding": ("relu", 34, 12, 16, None, True, True, True),
}
MORE = {
    "a decay": ("elu", 1100, 16, 16, 1e-6, True, True, True),
    "a decay, wide": ("relu", 70, 80, 136, 1e-6, True, True, True),
    "several chunks": ("elu", 130, 16, 16, 1e-6, True, True),
    "wide values": ("elu", 40, 32, 136, 1e-6, False, True),
    "wide": ("hedgehog", 40, 128, 128, 1e-6, False, True),
    "256": ("relu", 33, 256, 256, 1e-3, False, True),
}


def drawn(case, dtype, batch=1, heads=2, kv_heads=1):
    name, length, dim, value_dim, eps, mask, state, *fades = case
    fades = any(fades)
    torch.manual_seed(0)
    leaves = [torch.randn(batch, h, length, d) for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))]
    features = dim * (2 if name == "hedgehog" else 1)
    if name == "identity":
        leaves[0], leaves[1] = leaves[0].abs(), leaves[1].abs()
    learned = [torch.randn(h, dim, dim) / 4 for h in (heads, kv_heads)] if name == "hedgehog" else []
    fading = [-torch.rand(kv_heads) / 4] if fades else []
    valid = torch.rand(batch, length) > 0.3 if mask else None
    before = torch.rand(batch, kv_heads, features, value_dim + 1) * 3 if state else None
    leaves, learned = ([t.to(dtype).requires_grad_() for t in given] for given in (leaves, learned + fading))

    def run(form, leaves, learned, before):
        deltas, log_decay = (learned[:-1], learned[-1]) if fades else (learned, None)
        maps = [FeatureMap("hedgehog", hedgehog_features, tensors={"delta": d}) for d in deltas] or [MAPS[name]] * 2
        return form.run(*leaves, *maps, 0.5, valid, before, eps, 64, True, log_decay)

    return run, leaves, learned, before


def check(case, dtype, heads=1):
    run, leaves, learned, before = drawn(case, dtype, heads=heads)
    ours = run(form, leaves, learned, before)
    exact = [[t.detach().double().requires_grad_() for t in given] for given in (leaves, learned)]
    expected = run(reference, *exact, None if before is None else before.double())
    assert_near(ours, expected, dtype, 2)
    assert_near(gradients(ours[:2], [*leaves, *learned]), gradients(expected[:2], [*exact[0], *exact[1]]), dtype, 2)
    return lambda: assert_near(run(form, leaves, learned, before), expected, dtype, 2)


@pytest.mark.parametrize("name", CASES)
def test_outputs_states_and_gradients(name):
    without_gradients = check(CASES[name], torch.float32, heads=2 if name == "elu" else 1)
    if "padding" in name:
        with torch.no_grad():
            without_gradients()


@pytest.mark.parametrize("name, dtype", (("elu", torch.float16), ("hedgehog", torch.bfloat16)))
def test_short_numbers(name, dtype):
    check((name, 16, 16, 16, 1e-6, False, True, name == "hedgehog"), dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", MORE)
def test_longer_and_wider(name, dtype):
    check(MORE[name], dtype, heads=2)


@pytest.mark.parametrize("name", ("elu", "hedgehog"))
def test_a_token_after_a_state(name):
    run, leaves, learned, before = drawn((name, 1, 24, 40, 1e-6, name == "elu", True, True), torch.float32, 2, 4, 2)
    kept = before.clone()
    with torch.no_grad():
        ours = run(form, leaves, learned, before)
        expected = run(reference, *([t.double() for t in x] for x in (leaves, learned)), before.double())
    assert_near(ours, expected, torch.float32)
    assert torch.equal(before, kept)  # what a caller holds is left as it is


def test_rows_see_no_later_token():
    run, leaves, learned, before = drawn(("elu", 35, 16, 16, 1e-6, False, False), torch.float32, heads=1)
    with torch.no_grad():
        first = run(form, leaves, learned, before)[0]
        for leaf in leaves:
            leaf[:, :, 20:] += 1
        second = run(form, leaves, learned, before)[0]
    assert torch.equal(first[:, :, :20], second[:, :, :20])
    assert not torch.equal(first[:, :, 20:], second[:, :, 20:])
