"""Attention by tiles of query rows: what a row needs of the `n x n` scores exists for one tile at a time.

The backward pass computes a tile again instead of keeping it (the recomputation of Chen 2016, per tile as in
Rabe & Staats 2021). O(n^2 d) time for full rows, O(n w d) for a window of w keys; O(n d) memory either way.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .heads import cast_like, compute_dtype

# Elements of one tile of scores: with a few temporaries of that size a tile stays in a core's cache.
TILE_ELEMENTS = 1 << 20


class Tile(NamedTuple):
    """Query rows, the slice of keys that they may see, and which of those (bool, broadcastable to `[B, H, t, s]`)."""

    rows: slice
    columns: slice
    allowed: Tensor


Attend = Callable[[Tensor, Tensor, Tensor, Tile], tuple[Tensor, ...]]


def rows_per_tile(batch: int, heads: int, key_length: int) -> int:
    """Rows that keep a tile of scores near `TILE_ELEMENTS`, between 16 and 256."""
    return max(16, min(256, TILE_ELEMENTS // max(1, batch * heads * key_length)))


def by_rows(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Iterable[Tile],
    parameters: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """Run `attend(query_tile, key_columns, value_columns, tile)` over tiles and join the rows of its results.

    Args:
        attend: plain torch operations; returns tensors whose dimension 2 is the rows of the tile. It is called again
            in the backward pass.
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`.
        tiles: cover the rows in order, each row once.
        parameters: every other tensor that `attend` uses and that needs a gradient.
    """
    tiles = tuple(tiles)
    if torch.is_grad_enabled():
        return _ByRows.apply(attend, tiles, query, key, value, *parameters)
    return _join(attend, tiles, query, key, value)


def _call(attend: Attend, tile: Tile, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return attend(query[:, :, tile.rows], key[:, :, tile.columns], value[:, :, tile.columns], tile)


def _join(attend, tiles, query, key, value):
    results = None
    for tile in tiles:
        parts = _call(attend, tile, query, key, value)
        if results is None:  # [B, T, H, ...] in memory, as the model's output projection reads it
            results = tuple(
                p.new_empty(p.shape[0], query.shape[2], p.shape[1], *p.shape[3:]).transpose(1, 2) for p in parts
            )
        for result, part in zip(results, parts, strict=True):
            result[:, :, tile.rows] = part
    return results


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attend, tiles, query, key, value, *parameters):
        ctx.attend, ctx.tiles = attend, tiles
        ctx.save_for_backward(query, key, value, *parameters)
        return _join(attend, tiles, query, key, value)

    @staticmethod
    def backward(ctx, *grad_results):
        query, key, value, *parameters = ctx.saved_tensors
        wanted = [i for i, p in enumerate(parameters) if p.requires_grad]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (
            torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (key, value)
        )
        grad_parameters = [torch.zeros_like(p, dtype=compute_dtype(p.dtype)) for p in parameters]
        for tile in ctx.tiles:
            with torch.enable_grad():
                leaves = [
                    t.detach().requires_grad_()
                    for t in (query[:, :, tile.rows], key[:, :, tile.columns], value[:, :, tile.columns])
                ]
                parts = ctx.attend(*leaves, tile)
            pairs = [(p, g[:, :, tile.rows]) for p, g in zip(parts, grad_results, strict=True) if p.requires_grad]
            grads = torch.autograd.grad(
                [p for p, _ in pairs],
                [*leaves, *(parameters[i] for i in wanted)],
                [g for _, g in pairs],
                allow_unused=True,
            )
            grad_query[:, :, tile.rows] = 0 if grads[0] is None else grads[0]
            for total, grad in ((grad_key, grads[1]), (grad_value, grads[2])):
                if grad is not None:
                    total[:, :, tile.columns] += grad
            for i, grad in zip(wanted, grads[3:], strict=True):
                if grad is not None:
                    grad_parameters[i] += grad
        return (
            None,
            None,
            grad_query,
            grad_key.to(key.dtype),
            grad_value.to(value.dtype),
            *cast_like(grad_parameters, parameters),
        )
