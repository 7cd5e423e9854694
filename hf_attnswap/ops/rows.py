"""Compute attention by tiles of query rows: of the `n x n` scores only those of one tile exist at a time.

A tile may hand a tensor on to the next: the state of a recurrence.

The backward pass computes a tile again instead of keeping it (the recomputation of Chen 2016, per tile as in
Rabe & Staats 2021). O(n^2 d) time for full rows, O(n w d) for a window of w keys; O(n d) memory either way.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..masks import Tile
from .heads import cast_like, compute_dtype, distinct
from .programs import in_one_piece

# Elements of one tile of scores: with a few temporaries of that size a tile stays in a core's cache.
TILE_ELEMENTS = 1 << 20


# Given query `[B, H, t, D]`, key `[B, Hkv, s, D]`, value `[B, Hkv, s, Dv]` and bias (or None) of a tile, the tile, and
# what the tile before handed on: the results of its rows, and what it hands on.
Attend = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tile, Tensor | None], tuple[tuple[Tensor, ...], Tensor | None]
]


def rows_per_tile(batch: int, heads: int, key_length: int) -> int:
    """Return how many rows keep a tile of scores near `TILE_ELEMENTS` numbers, between 16 and 256.

    Args:
        batch, heads: B and H.
        key_length: keys that each row sees.
    """
    return max(16, min(256, TILE_ELEMENTS // max(1, batch * heads * key_length)))


def by_rows(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Iterable[Tile],
    parameters: Sequence[Tensor] = (),
    bias: Tensor | None = None,
    carry: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Run `attend(query_tile, key_columns, value_columns, bias_tile, tile, carry)` over tiles and join the rows.

    With a gradient, memory is O(n d): the backward pass calls `attend` again, tile by tile from the last to the first.
    Under torch.compile, torch.export and torch.func autograd goes through all tiles.

    Args:
        attend: plain torch operations. Returns a tuple of tensors whose dimension 2 is the rows of the tile, and the
            tensor handed on to the next tile (or None).
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`.
        tiles: cover the rows in order, each row once.
        parameters: every other tensor that `attend` uses and that needs a gradient.
        bias: `[1 or B, 1 or H, T, S]`, added to the scores by `attend`.
        carry: the tensor handed to the first tile, a constant to the gradient.

    Returns:
        The tensors of `attend` over all rows, and what the last tile hands on, without a gradient.
    """
    tiles = tuple(tiles)
    by_hand = not torch.compiler.is_compiling() and not in_one_piece(query, key)
    if torch.is_grad_enabled() and by_hand:
        *results, carry = _ByRows.apply(attend, tiles, query, key, value, bias, carry, *distinct(parameters))
        return tuple(results), carry
    results, carry, _ = _join(attend, tiles, query, key, value, bias, carry)
    return results, None if carry is None else carry.detach()


def _slices(tile: Tile, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    """Return the rows of the query and the columns of key and value of a tile, and both of the bias."""
    return [
        query[:, :, tile.rows],
        key[:, :, tile.columns],
        value[:, :, tile.columns],
        None if bias is None else bias[:, :, tile.rows, tile.columns],
    ]


def _join(attend, tiles, query, key, value, bias, carry):
    """Return the joined rows, what the last tile hands on, and what every tile was handed."""
    results, carries = None, []
    for tile in tiles:
        carries.append(carry)
        parts, carry = attend(*_slices(tile, query, key, value, bias), tile, carry)
        if len(tiles) == 1:
            return parts, carry, carries
        if results is None:  # [B, T, H, ...] in memory, as the model's output projection reads it
            results = tuple(
                p.new_empty(p.shape[0], query.shape[2], p.shape[1], *p.shape[3:]).transpose(1, 2) for p in parts
            )
        for result, part in zip(results, parts, strict=True):
            result[:, :, tile.rows] = part
    return results, carry, carries


class _ByRows(torch.autograd.Function):
    """Run tiles without keeping their scores; the backward pass runs each tile again under autograd."""

    @staticmethod
    def forward(ctx, attend, tiles, query, key, value, bias, carry, *parameters):
        ctx.attend, ctx.tiles = attend, tiles
        results, carry, carries = _join(attend, tiles, query, key, value, bias, carry)
        ctx.save_for_backward(query, key, value, bias, *parameters, *carries)
        if carry is not None:
            ctx.mark_non_differentiable(carry)
        return *results, carry

    @staticmethod
    def backward(ctx, *grad_results):
        saved = ctx.saved_tensors  # once: checkpointing computes them again
        inputs, parameters, carries = saved[:4], saved[4 : -len(ctx.tiles)], saved[-len(ctx.tiles) :]
        wanted = [p for p in parameters if p.requires_grad]
        totals = [None if t is None else torch.zeros_like(t, dtype=compute_dtype(t.dtype)) for t in inputs]
        grad_wanted = [torch.zeros_like(p, dtype=compute_dtype(p.dtype)) for p in wanted]
        grad_carry = None
        for tile, carry in reversed(list(zip(ctx.tiles, carries, strict=True))):
            with torch.enable_grad():
                leaves = [None if t is None else t.detach().requires_grad_() for t in _slices(tile, *inputs)]
                carry = None if carry is None else carry.detach().requires_grad_()
                parts, after = ctx.attend(*leaves, tile, carry)
            pairs = [
                (part, grad[:, :, tile.rows])
                for part, grad in zip(parts, grad_results[:-1], strict=True)
                if part.requires_grad
            ]
            if grad_carry is not None:
                pairs.append((after, grad_carry))
            found = [i for i, leaf in enumerate(leaves) if leaf is not None]
            sources = [*(leaves[i] for i in found), *wanted, *([] if carry is None else [carry])]
            outputs, grad_outputs = zip(*pairs, strict=True)
            grads = list(torch.autograd.grad(outputs, sources, grad_outputs, allow_unused=True))
            grad_carry = None if carry is None else grads.pop()
            slices = _slices(tile, *totals)
            targets = [*(slices[i] for i in found), *grad_wanted]
            for target, grad in zip(targets, grads, strict=True):
                if grad is not None:
                    target += grad
        grads = [None if g is None else g.to(t.dtype) for g, t in zip(totals, inputs, strict=True)]
        by_parameter = iter(cast_like(grad_wanted, wanted))
        return None, None, *grads, None, *(next(by_parameter) if p.requires_grad else None for p in parameters)
