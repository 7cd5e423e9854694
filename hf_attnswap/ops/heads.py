"""Products of query heads with the key/value heads that they share (grouped-query attention)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def stack_groups(query: Tensor, num_key_value_heads: int) -> Tensor:
    """`[B, H, T, D]` -> `[B, Hkv, G * T, D]`: the query heads of a group, one below the other.

    One product per key/value head then serves the whole group, and keys and values are never repeated.
    """
    batch, heads, length, dim = query.shape
    return query.reshape(batch, num_key_value_heads, heads // num_key_value_heads * length, dim)


def unstack_groups(rows: Tensor, num_attention_heads: int) -> Tensor:
    """`[B, Hkv, G * T, D]` -> `[B, H, T, D]`, the inverse of `stack_groups`."""
    batch, kv_heads, stacked, dim = rows.shape
    return rows.reshape(batch, num_attention_heads, kv_heads * stacked // num_attention_heads, dim)


def scores(query: Tensor, key: Tensor) -> Tensor:
    """query `[B, H, T, D]`, key `[B, Hkv, S, D]` -> `query . key`, `[B, H, T, S]`."""
    stacked = stack_groups(query, key.shape[1])
    return unstack_groups(torch.matmul(stacked, key.transpose(-1, -2)), query.shape[1])


def mix(weights: Tensor, value: Tensor) -> Tensor:
    """weights `[B, H, T, S]`, value `[B, Hkv, S, Dv]` -> `sum_j weights_ij v_j`, `[B, H, T, Dv]`."""
    stacked = stack_groups(weights, value.shape[1])
    return unstack_groups(torch.matmul(stacked, value), weights.shape[1])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are accumulated: float32, or float64 where the inputs are float64."""
    return torch.promote_types(dtype, torch.float32)


def cast_like(gradients: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradients that were added up in `compute_dtype`, in the dtypes of their parameters."""
    return [g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, each once: autograd would count the gradient of one that is given twice as often."""
    return list({id(t): t for t in tensors}.values())
