"""The CPU kernels of activations on the scores against the float64 definition, at shapes drawn at random."""

import pytest
import torch
from ops.kernels import draw, each_set, needs_kernels, paired, tensors  # noqa: F401

from hf_attnswap import attentions
from hf_attnswap.attentions import Heads
from hf_attnswap.masks import Mask
from hf_attnswap.ops.scores import cpu, reference

pytestmark = needs_kernels
VARIANTS = [
    ("relu", {}), ("relu", {"alpha": 0.5}), ("relu2", {}), ("gelu", {}), ("softplus", {}), ("sigmoid", {}),
    ("relu_norm", {}), ("relu2_norm", {}), ("softplus_norm", {}), ("rela", {}), ("softmax", {}),
    ("relu_power", {}), ("relu_power", {"p": 1}), ("relu_power", {"p": 4, "temperature": True, "gain": True}),
    ("relu_power", {"p": 2, "shift": "none"}),
]  # fmt: skip


def drawn(seed):
    """Query, key and value, the rest of the arguments, and what the variant learns."""
    pick, sizes = draw(seed, lengths=(2, 15, 16, 17, 40, 150))
    q, k, v = tensors(pick, sizes)
    name, options = VARIANTS[seed % len(VARIANTS)]
    attention = attentions.get(name)(Heads(sizes["heads"], sizes["kv_heads"], sizes["dim"]), **options).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    rows, causal = sizes["length"], pick.random() < 0.7
    if pick.random() < 0.4:  # the last rows of a longer text, or another text
        rows = pick.choice([2, sizes["length"]])
        q = q[:, :, -rows:]
    valid = torch.rand(sizes["batch"], sizes["length"]) > 0.3 if pick.random() < 0.4 else None
    mask = Mask(rows, sizes["length"], valid=valid, causal=causal)
    more = (mask, pick.choice([0.3, 1.0]), attention.activation(), attention.head_gain(), torch.float64)
    return [q, k, v], more, [*more[2].learned(), *([] if more[3] is None else [more[3]])]


@pytest.mark.parametrize("seed", range(3 * len(VARIANTS)))
def test_outputs_and_gradients(each_set, seed):  # noqa: F811
    given, more, learned = drawn(seed)
    leaves = [t.detach().requires_grad_() for t in given]
    runs = [lambda form=form: (form.run(*leaves, *more),) for form in (cpu, reference)]
    for ours, expected in paired(*runs, [*leaves, *learned]):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(runs[0](), runs[1]())


@pytest.mark.parametrize("seed", range(2 * len(VARIANTS)))
def test_one_row(each_set, seed):  # noqa: F811
    """A step of generation: keys and values as a cache has them, of one token and of many."""
    pick, sizes = draw(seed, lengths=(1, 7, 16, 150, 300))
    sizes |= {"dim": pick.choice([16, 32, 80]), "value_dim": pick.choice([16, 48])}
    given = [t.detach() for t in tensors(pick, sizes)]
    name, options = VARIANTS[seed % len(VARIANTS)]
    attention = attentions.get(name)(Heads(sizes["heads"], sizes["kv_heads"], sizes["dim"]), **options).double()
    valid = torch.rand(sizes["batch"], sizes["length"]) > 0.3 if pick.random() < 0.5 else None
    mask = Mask(1, sizes["length"], valid=valid)
    more = (mask, pick.choice([0.3, 1.0]), attention.activation(), attention.head_gain(), torch.float64)
    with torch.no_grad():
        ours, expected = (form.run(given[0][:, :, -1:], *given[1:], *more) for form in (cpu, reference))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("rows", (1, 40))
@pytest.mark.parametrize("name", ("softmax", "relu_norm", "relu_power", "sigmoid"))
def test_numbers_that_are_not(each_set, name, rows):  # noqa: F811
    """NaN and inf in a key reach the rows that see it, and no others."""
    torch.manual_seed(0)
    attention = attentions.get(name)(Heads(3, 1, 16))
    for broken in (float("nan"), float("inf"), float("-inf")):
        q, k, v = (torch.randn(1, h, 200, 16, dtype=torch.float64) for h in (3, 1, 1))
        k[0, 0, 180, 3] = broken
        q = q[:, :, -rows:]
        more = (Mask(rows, 200), 0.3, attention.activation(), None, torch.float64)
        with torch.no_grad():
            ours, expected = (form.run(q.clone(), k, v, *more) for form in (cpu, reference))
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("name", ("relu_norm", "relu_power", "sigmoid", "softplus_norm", "gelu", "softmax"))
def test_error_of_float32(name):
    torch.manual_seed(0)
    attention = attentions.get(name)(Heads(6, 2, 32))
    given = [torch.randn(1, h, 300, 32) for h in (6, 2, 2)]
    with torch.no_grad():
        more = (Mask(300, 300), 0.3, attention.activation(), None)
        exact = reference.run(*(t.double() for t in given), *more, torch.float64)
        ours = cpu.run(*given, *more, torch.float32)
        assert (ours.double() - exact).norm() / exact.norm() < 2e-6
        for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
            ours = cpu.run(*(t.to(dtype) for t in given), *more, dtype)
            assert (ours.double() - exact).norm() / exact.norm() < tolerance


def test_threads_give_the_same_gradients():
    torch.manual_seed(0)
    attention = attentions.get("relu_norm")(Heads(2, 1, 16))
    leaves = [torch.randn(1, h, 300, 16, requires_grad=True) for h in (2, 1, 1)]
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            out = cpu.run(*leaves, Mask(300, 300), 0.3, attention.activation(), None, torch.float32)
            found.append(torch.autograd.grad(out.square().sum(), leaves))
    finally:
        torch.set_num_threads(before)
    for one, two, again in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
        assert torch.equal(two, again)


def test_torch_knows_the_operator():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 5, 8, requires_grad=True) for h in (2, 1, 1))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(cpu.forward, (q, k, v, None, None, 0, 0, 2, 0.0, 1e-6, 0.5, True), test_utils=checks)
