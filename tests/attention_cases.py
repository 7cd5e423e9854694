"""Every registered variant, at its defaults and with other options, and random inputs for it."""

from typing import NamedTuple

import pytest
import torch
from device_under_test import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_attnswap import attentions
from hf_attnswap.attentions import Attention, Heads, Option
from hf_attnswap.masks import Mask, Rotation

NAMES = attentions.names()
HEAD_DIM, VALUE_DIM, SCALING = 8, 6, 0.4
# A window that is smaller than the texts, for the variants that have one.
SMALL = {"window": 8, "sinks": 2}
# What a variant may have for texts beyond the lengths of its training.
FAR = {"unrotate": True, "half_life": 9.0}
PADDINGS = ("none", "left", "right", "middle")


def small_options(name: str) -> dict:
    """The options of `SMALL` that the variant has."""
    known = attentions.get(name).options()
    return {option: value for option, value in SMALL.items() if option in known}


def far_options(name: str) -> dict:
    """The options of `SMALL` and `FAR` that the variant has."""
    known = attentions.get(name).options()
    return {option: value for option, value in (SMALL | FAR).items() if option in known}


def other_options(name: str) -> list[dict]:
    """One dict per option and value that is not the default: the extremes of what it takes."""
    found = [options for options in (small_options(name), far_options(name)) if options]
    for option, described in attentions.get(name).options().items():
        found += [{option: value} for value in _extremes(described) if value != described.default]
    return found


def _extremes(option: Option) -> list:
    if option.choices is not None:
        return [option.choices[0], option.choices[-1]]
    if isinstance(option.default, bool):
        return [not option.default]
    return [] if option.minimum is None else [type(option.default)(option.minimum)]


def case_id(value) -> str | None:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "defaults"
    return None


# Every variant with every kind of attention that it is for.
KINDS = [(name, kind) for name in NAMES for kind in attentions.get(name).kinds]
WITH_OPTIONS = [(name, options) for name in NAMES for options in other_options(name)]


def crossed(rows, columns, every: int = 3, whole: int = 1) -> list:
    """Every pair of the two lists. Those of the first `whole` rows, and of the others each column in one of `every`
    rows, are in the default suite; the rest is long."""
    return [
        pytest.param(row, column, marks=() if i < whole or (i + j) % every == 0 else pytest.mark.long)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def named(condition) -> list[str]:
    """The names of the variants whose class fulfils a condition."""
    return [name for name in NAMES if condition(attentions.get(name))]


def build(name: str, heads: int = 2, kv_heads: int = 2, dtype: torch.dtype = torch.float64, **options) -> Attention:
    """A variant whose parameters are random rather than at their start."""
    made = attentions.get(name)(Heads(heads, kv_heads, HEAD_DIM, VALUE_DIM), **options).to(DEVICE, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


def inputs(
    length: int,
    heads: int = 2,
    kv_heads: int = 2,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    key_length: int | None = None,
) -> Inputs:
    """Random query, key and value that take part in a graph; values are narrower than keys."""
    generator = torch.Generator().manual_seed(seed)
    n = length if key_length is None else key_length
    shapes = ((heads, length, HEAD_DIM), (kv_heads, n, HEAD_DIM), (kv_heads, n, VALUE_DIM))
    made = (torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return Inputs(*(t.to(dtype).requires_grad_() for t in made))


def valid_keys(padding: str, length: int) -> Tensor | None:
    """bool `[2, length]`: row 0 has no padding, two fifths of row 1 are padding."""
    if padding == "none":
        return None
    valid = torch.ones(2, length, dtype=torch.bool)
    size = length * 2 // 5
    start = {"left": 0, "right": length - size, "middle": (length - size) // 2}[padding]
    valid[1, start : start + size] = False
    return valid


def gradients(out: Tensor, wanted: list[Tensor], rows: Tensor | None) -> list[Tensor]:
    """Of a random projection of the valid rows of the output; zeros where a tensor has no part in it."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if rows is not None:
        weight = weight * rows[:, None, :, None]
    grads = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True)]


def rotation(length: int, batch: int = 2) -> Rotation:
    """Of some numbers of each head, by other angles for each token of each text."""
    angles = torch.rand(batch, 512, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[:, :length] * 6
    return Rotation(torch.cat([angles.cos(), angles.sin()], dim=-1).to(DEVICE), neighbours=True, start=1)


def causal(length: int, valid: Tensor | None = None) -> Mask:
    return Mask(length, length, valid=valid, rotation=rotation(length, 2 if valid is None else len(valid)))


def mask_of(kind: str, length: int, padding: str) -> Mask:
    """Of texts of this length, where cross-attention sees a longer one."""
    n = length + 7 if kind == "cross" else length
    turned = None if kind == "cross" else rotation(length)
    return Mask(length, n, valid=valid_keys(padding, n), causal=kind == "causal", rotation=turned)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Largest difference against the largest expected value."""
    largest = expected.abs().max().clamp(min=1e-30) if expected.numel() else torch.ones(())
    error = (actual.double() - expected.double()).abs().max() / largest if expected.numel() else torch.zeros(())
    assert error <= tolerance, f"{what}: error {error:.2e} of the largest value, allowed {tolerance:.0e}"


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if torch.is_tensor(t)]
        self.elements = max(self.elements, *sizes) if sizes else self.elements
        return result
