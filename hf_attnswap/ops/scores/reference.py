"""Compute the formula over whole matrices: O(n^2) memory, in float64 where the inputs are."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...masks import Mask, Tile
from ..heads import compute_dtype, mix, scores
from ..spec import Activation


def run(query, key, value, mask, scaling, activation, gain, result_dtype):
    """Return what `score_attention` returns, from the whole matrix of weights: O(n^2 d) time, O(n^2) memory.

    Takes the arguments of `score_attention` in order; differentiable by autograd.
    """
    query, key, value = (t.to(compute_dtype(query.dtype)) for t in (query, key, value))
    return with_gain(mix(score_weights(query, key, mask, scaling, activation), value), gain).to(result_dtype)


def score_weights(query: Tensor, key: Tensor, mask: Mask, scaling: float, activation: Activation) -> Tensor:
    """Return what each row takes of each value, `a_ij / d_i` as `[B, H, T, S]`, in the dtype of the query.

    O(n^2 d) time and O(n^2) memory. Where the mask has sinks, their column is left out.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`. mask, scaling, activation: as in `score_attention`.
    """
    everything = Tile(slice(0, mask.query_length), slice(0, mask.key_length), mask.matrix(query.device))
    weights, denominator = weights_and_denominator(query, key, everything, mask, mask.bias, scaling, activation)
    weights = weights if denominator is None else weights / denominator
    return weights if mask.sinks is None else weights[..., :-1]


def weights_and_denominator(
    query: Tensor, key: Tensor, tile: Tile, mask: Mask, bias: Tensor | None, scaling: float, activation: Activation
) -> tuple[Tensor, Tensor | None]:
    """Return the a_ij of a tile, with those of the sinks as last column, and its d_i (None for 1).

    Args:
        query: `[B, H, t, D]`; key: `[B, Hkv, s, D]`, in the same dtype.
        tile: which rows and columns these are, and which of the columns each row may see.
        mask: for its soft cap and sinks.
        bias: of these rows and columns, or None.
        scaling: factor of the scores.
        activation: the weights and the denominator.

    Returns:
        `[B, H, t, s]`, or one column more where the mask has sinks, and d broadcastable to `[B, H, t, 1]`.
    """
    factor = activation.factor_for(query)
    if bias is None and mask.softcap is None and mask.sinks is None:
        s = scores(query * (scaling * factor), key)
    else:
        s = scores(query * scaling, key)
        if mask.softcap is not None:
            s = mask.softcap * torch.tanh(s / mask.softcap)
        if bias is not None:
            s = s + bias
        s = s * factor
    s = forbid(s, tile)
    count = tile.count()
    if mask.sinks is not None:
        sinks = (mask.sinks.to(s.dtype)[:, None, None] * factor).expand(*s.shape[:-1], 1)
        s, count = torch.cat([s, sinks], dim=-1), count + 1
    peak = None
    if activation.needs_peak:
        peak = s.amax(-1, keepdim=True) if s.shape[-1] else s.sum(-1, keepdim=True)  # torch has none of no keys
    weights = activation(s, count, peak)
    if activation.denominator is None:
        return weights, None
    total = weights.sum(-1, keepdim=True) if activation.needs_total else None
    return weights, activation.denominator(total, count.to(weights.dtype))


def with_gain(out: Tensor, gain: Tensor | None) -> Tensor:
    """Return `[B, H, t, Dv]` times the gain of each head, `[H]`; without a gain, the tensor itself."""
    return out if gain is None else out * gain.to(out.dtype)[:, None, None]


def forbid(scores: Tensor, tile: Tile) -> Tensor:
    """Return the scores with -inf where the tile does not allow the key, in place where gradients are disabled."""
    if torch.is_grad_enabled():
        allowed = F.pad(tile.allowed, (tile.free, 0), value=True) if tile.free else tile.allowed
        return scores.masked_fill(~allowed, float("-inf"))
    scores[..., tile.free :].masked_fill_(~tile.allowed, float("-inf"))
    return scores
