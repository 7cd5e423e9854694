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
    """Query rows, the slice of keys that they may see, and which of those.

    All rows see the first `free` of the columns; `allowed` is about the others, bool, broadcastable to
    `[B, H, t, s - free]`.
    """

    rows: slice
    columns: slice
    allowed: Tensor
    free: int = 0

    def count(self) -> Tensor:
        """How many keys each row may attend to, broadcastable to `[B, H, t, 1]`."""
        return (self.allowed.sum(-1, keepdim=True) + self.free).clamp(min=1)


# query `[B, H, t, D]`, key `[B, Hkv, s, D]`, value `[B, Hkv, s, Dv]` and bias (or None) of one tile.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tile], tuple[Tensor, ...]]


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
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Run `attend(query_tile, key_columns, value_columns, bias_tile, tile)` over tiles and join the rows.

    Args:
        attend: plain torch operations; returns tensors whose dimension 2 is the rows of the tile. It is called again
            in the backward pass.
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`.
        tiles: cover the rows in order, each row once.
        parameters: every other tensor that `attend` uses and that needs a gradient.
        bias: `[1 or B, 1 or H, T, S]`, what is added to the scores.
    """
    tiles = tuple(tiles)
    if torch.is_grad_enabled():
        return _ByRows.apply(attend, tiles, query, key, value, bias, *parameters)
    return _join(attend, tiles, query, key, value, bias)


def _slices(tile: Tile, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    return [
        query[:, :, tile.rows],
        key[:, :, tile.columns],
        value[:, :, tile.columns],
        None if bias is None else bias[:, :, tile.rows, tile.columns],
    ]


def _join(attend, tiles, query, key, value, bias):
    results = None
    for tile in tiles:
        parts = attend(*_slices(tile, query, key, value, bias), tile)
        if results is None:  # [B, T, H, ...] in memory, as the model's output projection reads it
            results = tuple(
                p.new_empty(p.shape[0], query.shape[2], p.shape[1], *p.shape[3:]).transpose(1, 2) for p in parts
            )
        for result, part in zip(results, parts, strict=True):
            result[:, :, tile.rows] = part
    return results


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attend, tiles, query, key, value, bias, *parameters):
        ctx.attend, ctx.tiles = attend, tiles
        ctx.save_for_backward(query, key, value, bias, *parameters)
        return _join(attend, tiles, query, key, value, bias)

    @staticmethod
    def backward(ctx, *grad_results):
        saved = ctx.saved_tensors  # once: checkpointing computes them again
        inputs, parameters = saved[:4], saved[4:]
        wanted = [p for p in parameters if p.requires_grad]
        totals = [None if t is None else torch.zeros_like(t, dtype=compute_dtype(t.dtype)) for t in inputs]
        grad_wanted = [torch.zeros_like(p, dtype=compute_dtype(p.dtype)) for p in wanted]
        for tile in ctx.tiles:
            with torch.enable_grad():
                leaves = [None if t is None else t.detach().requires_grad_() for t in _slices(tile, *inputs)]
                parts = ctx.attend(*leaves, tile)
            pairs = [(p, g[:, :, tile.rows]) for p, g in zip(parts, grad_results, strict=True) if p.requires_grad]
            found = [i for i, leaf in enumerate(leaves) if leaf is not None]
            grads = torch.autograd.grad(
                [p for p, _ in pairs], [*(leaves[i] for i in found), *wanted], [g for _, g in pairs], allow_unused=True
            )
            slices = _slices(tile, *totals)
            targets = [*(slices[i] for i in found), *grad_wanted]
            for target, grad in zip(targets, grads, strict=True):
                if grad is not None:
                    target += grad
        grads = [None if g is None else g.to(t.dtype) for g, t in zip(totals, inputs, strict=True)]
        by_parameter = iter(cast_like(grad_wanted, wanted))
        return None, None, *grads, *(next(by_parameter) if p.requires_grad else None for p in parameters)
