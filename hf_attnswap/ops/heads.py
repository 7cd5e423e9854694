"""Multiply query heads with the key/value heads that they share (grouped-query attention)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def stack_groups(query: Tensor, num_key_value_heads: int) -> Tensor:
    """Return `[B, H, T, D]` as `[B, Hkv, G * T, D]`: the query heads of a group, one below the other.

    One product per key/value head then serves the whole group, and keys and values are never repeated.
    """
    batch, heads, length, dim = query.shape
    return query.reshape(batch, num_key_value_heads, heads // num_key_value_heads * length, dim)


def unstack_groups(rows: Tensor, num_attention_heads: int) -> Tensor:
    """Return `[B, Hkv, G * T, D]` as `[B, H, T, D]`: the inverse of `stack_groups`."""
    batch, kv_heads, stacked, dim = rows.shape
    return rows.reshape(batch, num_attention_heads, kv_heads * stacked // num_attention_heads, dim)


def scores(query: Tensor, key: Tensor) -> Tensor:
    """Return the products `q_i . k_j`, `[B, H, T, S]`, without a scaling factor; O(T S D) time.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`, in the same dtype.
    """
    stacked = stack_groups(query, key.shape[1])
    return unstack_groups(torch.matmul(stacked, key.transpose(-1, -2)), query.shape[1])


def mix(weights: Tensor, value: Tensor) -> Tensor:
    """Return the weighted sums of the values, `o_i = sum_j w_ij v_j`, `[B, H, T, Dv]`; O(T S Dv) time.

    Args:
        weights: `[B, H, T, S]`; value: `[B, Hkv, S, Dv]`, in the same dtype.
    """
    stacked = stack_groups(weights, value.shape[1])
    return unstack_groups(torch.matmul(stacked, value), weights.shape[1])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums are accumulated: float32, or float64 for inputs in float64."""
    return torch.promote_types(dtype, torch.float32)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in `dtype`: `x` itself where it is, at once, for which `Tensor.to` takes microseconds."""
    return x if x.dtype == dtype else x.to(dtype)


def cast_like(gradients: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients that were added up in `compute_dtype`, each cast to the dtype of its parameter."""
    return [g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors without repetitions, in order.

    Autograd would count the gradient of a tensor that is passed to a Function twice as often.
    """
    return list({id(t): t for t in tensors}.values())


def softmax_of_seen(scores: Tensor) -> Tensor:
    """Return the softmax of scores `[..., S]`, 0 in rows that see nothing, whose scores are all -inf; NaN stays NaN."""
    return torch.softmax(scores, dim=-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
