"""What the kernel of every op makes of inputs at the edge: what the definition in float64 makes of them."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from kernels import each_set, needs_kernels, paired  # noqa: F401

from hf_attnswap import attentions
from hf_attnswap.attentions import Heads
from hf_attnswap.attentions.elu import ELU
from hf_attnswap.masks import Mask
from hf_attnswap.ops.backends import OPS

pytestmark = needs_kernels
NAMES = [name for name in sorted(OPS) if "cpu" in OPS[name].forms]
every_op = pytest.mark.parametrize("op", NAMES)


def forms(op: str):
    """The kernel's form of an op, and its definition."""
    return [importlib.import_module(f"hf_attnswap.ops.{op}.{backend}") for backend in ("cpu", "reference")]


def behind(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
    """What the form of an op takes behind query, key and value."""
    length, batch, heads, kv_heads = q.shape[2], q.shape[0], q.shape[1], k.shape[1]
    generator = torch.Generator().manual_seed(1)
    numbers = torch.rand(2, batch, kv_heads, length, generator=generator, dtype=q.dtype)
    if op == "scores":
        return Mask(length, length), 0.1, attentions.get("relu_norm")(Heads(2, 1, 8)).activation(), None, q.dtype
    return {
        "linear": (ELU, ELU, 1.0, None, None, 1e-6, 64, True, None),
        "gated": (numbers[0].log(), None, 1e-6, 64),
        "delta": (numbers[0], None, 64),
        "gated_delta": (numbers[0], numbers[1].log(), None, 64),
        "window": (0.1, 5, 2, None, None, False, None),
        "hybrid": (ELU, ELU, q.new_zeros(heads), 0.1, 5, 2, None, None, False, None, None),
        "softmax": (Mask(length, length), 0.1, 0.0),
    }[op]


def given(op: str, length: int, dim: int, value_dim: int, dtype=torch.float64) -> list[torch.Tensor]:
    """Query, key and value with tokens and numbers that do not stand side by side; features where the op takes them."""
    torch.manual_seed(length + dim)
    shapes = ((4, dim), (2, dim), (2, value_dim))
    made = [
        torch.randn(2, length + 1, 2 * h, d + 3, dtype=dtype)[:, 1:, ::2, 1 : d + 1].transpose(1, 2) for h, d in shapes
    ]
    if op == "gated":
        made[:2] = [F.elu(t) + 1 for t in made[:2]]
    if op in ("delta", "gated_delta"):
        made[:2] = [F.normalize(t, dim=-1) for t in made[:2]]
    return made


def output(result) -> torch.Tensor:
    return result if torch.is_tensor(result) else result[0]


@every_op
@pytest.mark.parametrize(("dim", "value_dim"), ((9, 11), (100, 129), (251, 254), (256, 256)))
def test_heads_of_any_width(op, dim, value_dim):
    leaves = [t.detach().requires_grad_() for t in given(op, 37, dim, value_dim)]
    more = behind(op, *leaves)
    runs = [lambda form=form: (output(form.run(*leaves, *more)),) for form in forms(op)]
    for ours, expected in paired(*runs, leaves):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


@every_op
@pytest.mark.parametrize("length", (0, 1))
def test_texts_of_no_token_and_of_one(each_set, op, length):  # noqa: F811
    tensors = given(op, length, 12, 20)
    with torch.no_grad():
        ours, expected = (output(form.run(*tensors, *behind(op, *tensors))) for form in forms(op))
    torch.testing.assert_close(ours, expected)


@every_op
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("where", (1, 2), ids=("key", "value"))
def test_what_is_no_number_stays_in_its_text_and_heads(each_set, op, where, value):  # noqa: F811
    """A key reaches the rows that see it alone. A value reaches other rows of its tile too, 0 NaN being NaN; in the
    definition, all rows."""
    clean = given(op, 40, 16, 16)
    broken = [t.clone() for t in clean]
    broken[where][0, 0, 20, 3] = value
    form, definition = forms(op)
    with torch.no_grad():
        before, after = (output(form.run(*tensors, *behind(op, *tensors))) for tensors in (clean, broken))
        expected = output(definition.run(*broken, *behind(op, *broken)))
    for untouched in ((1,), (0, slice(2, 4)), (0, slice(0, 2), slice(0, 20 if where == 1 else 16))):
        assert torch.equal(after[untouched], before[untouched])
    lost = slice(20, None if where == 1 else 21)
    assert torch.equal(after[:, :, lost].isfinite(), expected[:, :, lost].isfinite())
    assert after[expected.isfinite()].isfinite().all()


@every_op
def test_more_threads_than_cores_give_the_same(op):
    leaves = [t.detach().requires_grad_() for t in given(op, 70, 16, 16, torch.float32)]
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 64, 64):
            torch.set_num_threads(threads)
            out = output(forms(op)[0].run(*leaves, *behind(op, *leaves)))
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for one, many, again in zip(*found, strict=True):
        torch.testing.assert_close(one, many)
        assert torch.equal(many, again)
