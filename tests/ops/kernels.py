"""What the tests of the CPU kernels share: instruction sets, random shapes, and the comparison with the reference."""

import random

import pytest
import torch

from hf_attnswap import native
from hf_attnswap.native.build import instruction_sets

needs_kernels = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
SETS = [] if native.missing() else [name for name in instruction_sets() if native.runs(name)]


@pytest.fixture(params=SETS)
def each_set(request, monkeypatch):
    """Run the test with the kernels of each instruction set of this processor."""
    monkeypatch.setenv(native.VARIABLE, request.param)
    for cached in (native.instruction_set, native._kernel):
        cached.cache_clear()
    yield request.param
    monkeypatch.undo()
    for cached in (native.instruction_set, native._kernel):
        cached.cache_clear()


def draw(seed: int, lengths=(0, 1, 2, 31, 32, 33, 70)) -> tuple[random.Random, dict[str, int]]:
    """Random sizes, groups and head dimensions that are no multiples of a vector among them."""
    pick = random.Random(seed)
    group, kv_heads = pick.choice([1, 2, 3, 4, 5, 6, 8]), pick.choice([1, 2, 3])
    sizes = {"batch": pick.choice([1, 2, 3]), "heads": group * kv_heads, "kv_heads": kv_heads}
    sizes |= {"length": pick.choice(lengths), "dim": pick.choice([1, 3, 8, 10, 16, 40, 72])}
    return pick, sizes | {"value_dim": pick.choice([1, 5, 8, 13, 16, 40, 72])}


def tensors(pick: random.Random, s: dict[str, int], dtype=torch.float64) -> list[torch.Tensor]:
    """Query, key and value with strides as models have them, or odd ones, or those of a view of some heads."""
    torch.manual_seed(pick.randrange(1 << 30))
    found, layout = [], pick.choice(["model", "contiguous", "view", "odd"])
    for heads, dim in ((s["heads"], s["dim"]), (s["kv_heads"], s["dim"]), (s["kv_heads"], s["value_dim"])):
        if layout == "contiguous":
            x = torch.randn(s["batch"], heads, s["length"], dim, dtype=dtype)
        elif layout == "view":
            x = torch.randn(s["batch"], s["length"], 2 * heads, dim, dtype=dtype).transpose(1, 2)[:, ::2]
        elif layout == "odd":
            x = torch.randn(s["batch"], heads, s["length"], dim + 3, dtype=dtype)[..., 1 : dim + 1]
        else:
            x = torch.randn(s["batch"], s["length"], heads, dim, dtype=dtype).transpose(1, 2)
        found.append(x.requires_grad_())
    return found


def paired(form, reference, leaves, loss=lambda outs: sum(o.square().sum() for o in outs if o.requires_grad)):
    """Outputs and gradients of both forms on the same leaves, in pairs."""
    found = []
    for run in (form, reference):
        outs = [o for o in run() if torch.is_tensor(o)]
        grads = torch.autograd.grad(loss(outs), leaves, allow_unused=True) if outs[0].numel() else []
        found.append([*outs, *(g for g in grads if g is not None)])
    return zip(*found, strict=True)
