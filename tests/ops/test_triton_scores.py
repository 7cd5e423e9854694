"""The Triton kernels of activations on the scores against the float64 definition."""

import copy

import pytest
import torch
from ops.triton_kernels import assert_near, gradients

from hf_attnswap import attentions
from hf_attnswap.attentions import Heads
from hf_attnswap.masks import Mask
from hf_attnswap.ops.scores import reference
from hf_attnswap.ops.scores import triton as form

VARIANTS = {
    "relu": ("relu", {}), "relu2": ("relu2", {}), "gelu": ("gelu", {"alpha": 0.5}), "softplus": ("softplus", {}),
    "sigmoid": ("sigmoid", {}), "relu_norm": ("relu_norm", {"gain": True}), "softplus_norm": ("softplus_norm", {}),
    "rela": ("rela", {}), "softmax": ("softmax", {}), "relu_power": ("relu_power", {}),
    "relu_power 1": ("relu_power", {"p": 1}), "temperature": ("relu_power", {"p": 4, "temperature": True}),
    "unshifted": ("relu_power", {"p": 2, "shift": "none"}),
}  # fmt: skip
MASKS = {
    "causal": {}, "full": {"causal": False}, "left": {"valid": [[False] * 5 + [True] * 19]},
    "right": {"valid": [[True] * 11 + [False] * 13]}, "holes": {"valid": [[True, False, True] * 8], "causal": False},
}  # fmt: skip


def check(name, dtype, batch=1, heads=1, kv_heads=1, length=24, keys=24, dim=24, value_dim=16, scaling=0.5, **mask):
    name, options = VARIANTS[name]
    torch.manual_seed(0)
    attention = attentions.get(name)(Heads(heads, kv_heads, dim, value_dim), **options)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    shapes = (heads, length, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)
    leaves = [torch.randn(batch, *shape).to(dtype).requires_grad_() for shape in shapes]
    mask["valid"] = torch.tensor(mask["valid"]) if mask.get("valid") is not None else None
    mask = Mask(length, keys, **mask)

    def run(form, attention, leaves, dtype):
        given = (*leaves, mask, scaling, attention.activation(), attention.head_gain(), dtype)
        assert form is reference or form.unfit(*given) is None
        return form.run(*given)

    ours = run(form, attention, leaves, dtype)
    exact, exactly = copy.deepcopy(attention).double(), [t.detach().double().requires_grad_() for t in leaves]
    expected = run(reference, exact, exactly, torch.float64)
    assert_near([ours], [expected], dtype)
    learned = [[*a.activation().tensors.values(), *a.parameters()] for a in (attention, exact)]
    of_ours = gradients([ours], [*leaves, *learned[0]])
    assert_near(of_ours, gradients([expected], [*exactly, *learned[1]]), dtype, 2)
    return of_ours, lambda: assert_near([run(form, attention, leaves, dtype)], [expected], dtype)


# The others in the long tests.
MOST = [name for name in VARIANTS if name not in ("softplus", "rela", "relu_power 1", "unshifted")]


@pytest.mark.parametrize("name", MOST)
def test_outputs_and_gradients(name):
    check(name, torch.float32)


@pytest.mark.parametrize("mask", [m for m in MASKS if m != "causal"])
@pytest.mark.parametrize("name", ("relu", "temperature"))
def test_masks(name, mask):
    _, without_gradients = check(name, torch.float32, **MASKS[mask])
    with torch.no_grad():
        without_gradients()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("relu_norm", "relu_power"))
def test_short_numbers(name, dtype):
    check(name, dtype, length=17, keys=40)


@pytest.mark.long
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", VARIANTS)
def test_longer_and_wider(name, dtype):
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[0, :9], valid[1, 40:] = False, False
    check(name, dtype, batch=2, heads=4, kv_heads=2, length=33, keys=70, dim=80, value_dim=136, valid=valid.tolist())


@pytest.mark.long
def test_rows_with_little_weight_have_the_gradients_of_the_definition():
    """The first rows see few keys, and their sums are near zero: what the gradient subtracts must cancel."""
    check("relu_norm", torch.bfloat16, heads=2, length=130, keys=130, dim=128, value_dim=128, scaling=0.02)


def test_heads_that_share_keys_have_the_same_gradients_each_time():
    (first, _), (second, _) = (check("relu_norm", torch.float32, heads=2, length=17) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_the_kernels_do_not_take_is_said():
    q, k, v = (torch.randn(1, h, 4, 8) for h in (2, 1, 1))
    relu = attentions.get("relu")(Heads(2, 1, 8)).activation()

    def unfit(mask=None, value=v, scaling=1.0):
        return form.unfit(q, k, value, mask or Mask(4, 4), scaling, relu, None, torch.float32)

    assert unfit() is None
    assert "soft cap" in unfit(Mask(4, 4, softcap=3.0))
    assert "257 wide" in unfit(value=torch.randn(1, 1, 4, 257))
    assert "nothing" in unfit(value=v[:, :, :0])
    assert "positive" in unfit(scaling=-1.0)


def test_torch_knows_the_operator():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 5, 8, requires_grad=True) for h in (2, 1, 1))
    given = (q, k, v, *[None] * 5, 0, 0, 2, 0.0, 1e-6, 1.0, True, torch.float32, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(form.forward, given, test_utils=checks)
