"""Compute the formula over whole matrices: O(n^2) time and memory, in float64 where the inputs are; without a state."""

import torch
from torch import Tensor

from ...masks import Mask
from ..heads import compute_dtype, mix, scores, softmax_of_seen
from ..spec import FeatureMap
from ..window.reference import near

# Less mass than this counts as none: its reciprocal would overflow in the gradient.
NO_MASS = 1e-30


def unfit(
    query, key, value, map_query, map_key, log_mix, scaling, window, sinks, valid, state, keep_state,
    rotation, log_decay,
):  # fmt: skip
    """Return why this form cannot serve a call that takes or keeps a state, in words; None for all other calls."""
    return "the formula over whole matrices keeps no state for generation" if state is not None or keep_state else None


def run(
    query, key, value, map_query, map_key, log_mix, scaling, window, sinks, valid, state, keep_state,
    rotation, log_decay,
):  # fmt: skip
    """Return what `hybrid_attention` returns, and None for the state, from the whole matrix of weights; O(n^2) memory.

    Takes the arguments of `hybrid_attention` in order; differentiable by autograd.
    """
    mask = Mask(query.shape[2], key.shape[2], valid, rotation=rotation)
    q, k, v = (t.to(compute_dtype(query.dtype)) for t in (query, key, value))
    maps = map_query, map_key, log_mix
    weights = hybrid_weights(q, k, mask, *maps, scaling, window, sinks, log_decay)
    return mix(weights, v).to(query.dtype), None


def hybrid_weights(query, key, mask, map_query, map_key, log_mix, scaling, window, sinks, log_decay=None) -> Tensor:
    """Return what each row takes of each value, `[B, H, T, S]`, among the keys that `mask` leaves the row.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`.
        mask: its rotation, of the S keys, is undone before the maps.
        map_query, map_key, log_mix, scaling, window, sinks, log_decay: as in `hybrid_attention`.
    """
    maps = map_query, map_key, log_mix
    logs, _ = log_terms(query, key, mask, *maps, scaling, window, sinks, log_decay)
    return softmax_of_seen(logs)


def log_terms(
    query: Tensor,
    key: Tensor,
    mask: Mask,
    map_query: FeatureMap,
    map_key: FeatureMap,
    log_mix: Tensor,
    scaling: float,
    window: int,
    sinks: int,
    log_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the logs of the terms of the denominator, and which of these terms stand in the window.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`.
        mask, map_query, map_key, log_mix, scaling, window, sinks, log_decay: as in `hybrid_weights`.

    Returns:
        `[B, H, T, S]`, -inf where a key is not allowed or its features have no mass in the row, and the terms of the
        window as bool, broadcastable to `[B, H, T, S]`.
    """
    allowed = mask.matrix(query.device)
    inside = near(allowed, window, sinks, mask.places(query.device))
    q, k = mask.unrotated(query, key)
    features, left_out = map_query.beside_softmax(q)
    kernel = scores(features, map_key(k))
    outside = log_scale(q, log_mix, left_out) + log_of_mass(kernel)
    if log_decay is not None:
        rank = allowed.long().cumsum(-1)
        since = (rank[..., -1:] - window - rank).clamp(min=0).to(outside.dtype)
        per_head = log_decay.to(outside.dtype).repeat_interleave(query.shape[1] // key.shape[1])
        outside = outside + per_head[:, None, None] * since
    logs = torch.where(inside, scores(query, key) * scaling, outside)
    return logs.masked_fill(~allowed | (~inside & (kernel <= NO_MASS)), float("-inf")), inside


def log_scale(query: Tensor, log_mix: Tensor, left_out: Tensor | None) -> Tensor:
    """Return the log of the factor of the linear term in each row, `[B, H, T, 1]`: the mix and what the map left out.

    Args:
        query: `[B, H, T, D]`, for its shape and dtype.
        log_mix: `[H]`.
        left_out: `[B, H, T, 1]`, the second output of `FeatureMap.beside_softmax`, or None.
    """
    of_heads = log_mix.to(query.dtype)[:, None, None].expand(*query.shape[:3], 1)
    return of_heads if left_out is None else of_heads + left_out


def one_for_none(mass: Tensor) -> Tensor:
    """Return the mass, with 1 where it is at most `NO_MASS`."""
    return mass.masked_fill(mass <= NO_MASS, 1)


def log_of_mass(mass: Tensor) -> Tensor:
    """Return the log of the mass, 0 where there is none: there is nothing to weigh, and no gradient to spoil."""
    return one_for_none(mass).log()
