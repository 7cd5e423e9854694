"""Compute scores with torch alone, on any device.

One row goes at once, long plain texts on a CPU by blocks that fit its cache (`_blocks.py`), all else by tiles of rows
(`ops/rows.py`). All rows go at once where a program for any length is made, and inside torch.func's transforms.
"""

import torch

from ...masks import Tile
from ..chunks import in_large_kernels
from ..heads import compute_dtype, mix
from ..programs import in_one_piece
from ..rows import by_rows, rows_per_tile
from ._blocks import WORTH_IT, blocked_scores
from .reference import weights_and_denominator, with_gain


def run(query, key, value, mask, scaling, activation, gain, result_dtype):
    """Return what `score_attention` returns, by the fastest of `at_once`, `by_blocks` and `by_tiles`; O(n d) memory.

    O(n^2) where the call has to go in one piece. Takes the arguments of `score_attention` in order.
    """
    if in_one_piece(query, key) or query.shape[2] <= 1:
        form = at_once
    else:
        form = by_blocks if fits_blocks(query, key, mask, activation) else by_tiles
    return form(query, key, value, mask, scaling, activation, gain, result_dtype)


def _attend(query, key, value, bias, tile: Tile, mask, scaling, activation, gain, result_dtype):
    """Return the output of the rows of one tile, `[B, H, t, Dv]` in `result_dtype`."""
    dtype = compute_dtype(query.dtype)
    bias = None if bias is None else bias.to(dtype)
    weights, denominator = weights_and_denominator(
        query.to(dtype), key.to(dtype), tile, mask, bias, scaling, activation
    )
    out = mix(weights if mask.sinks is None else weights[..., :-1], value.to(dtype))
    out = out if denominator is None else out / denominator
    return with_gain(out, gain).to(result_dtype)


def at_once(query, key, value, mask, scaling, activation, gain, result_dtype):
    """Return the output of all rows together, such as the one of a step of generation; O(T S d) time, O(T S) memory.

    Arguments as in `run`.
    """
    tile = Tile(slice(None), slice(None), mask.matrix(query.device))
    return _attend(query, key, value, mask.bias, tile, mask, scaling, activation, gain, result_dtype)


def by_tiles(query, key, value, mask, scaling, activation, gain, result_dtype):
    """Return the output of all rows, tile by tile, under any mask; O(n d) memory. Arguments as in `run`."""

    def attend(query, key, value, bias, tile: Tile, carry):
        """Return the output of one tile; no tile hands anything on."""
        return (_attend(query, key, value, bias, tile, mask, scaling, activation, gain, result_dtype),), carry

    size = rows_per_tile(query.shape[0], query.shape[1], key.shape[2])
    learned = [*activation.learned(), *(t for t in (gain, mask.sinks) if t is not None)]
    (out,), _ = by_rows(attend, query, key, value, mask.tiles(size, query.device), learned, mask.bias)
    return out


def fits_blocks(query, key, mask, activation) -> bool:
    """Return whether blocks of scores in a CPU's cache can serve the call, and are faster than tiles.

    Blocks can serve a causal or full mask without padding, bias, soft cap or sinks, where no gradient through the
    largest score of a row is needed.
    """
    scores_per_head = query.shape[2] * key.shape[2] * query.shape[1] // key.shape[1]
    simple = mask.plain and mask.valid is None and not (torch.is_grad_enabled() and activation.needs_peak)
    return simple and scores_per_head >= WORTH_IT and not in_large_kernels(query)


def by_blocks(query, key, value, mask, scaling, activation, gain, result_dtype):
    """Return the output of all rows by blocks in a CPU's cache, where `fits_blocks` holds. Arguments as in `run`."""
    dtype = compute_dtype(query.dtype)
    query = query.to(dtype)
    query = query * (scaling * activation.factor_for(query))
    out, total = blocked_scores(query, key, value, activation, causal=mask.causal)
    if activation.denominator is not None:
        rows = torch.arange(query.shape[2], device=query.device) + mask.offset + 1
        count = rows[:, None] if mask.causal else torch.full_like(rows, key.shape[2])[:, None]
        out = out / activation.denominator(total, count.to(dtype))
    return with_gain(out, gain).to(result_dtype)
