"""The formula over whole matrices: O(n^2), float64 where the inputs are; without a state."""

import torch
from torch import Tensor

from ...masks import Mask
from ..heads import compute_dtype, mix, scores
from ..spec import FeatureMap
from ..window.reference import near

# Less mass than this counts as none: its reciprocal would overflow in the gradient.
NO_MASS = 1e-30


def unfit(query, key, value, map_query, map_key, log_mix, scaling, window, sinks, valid, state, keep_state):
    return "the formula over whole matrices keeps no state for generation" if state is not None or keep_state else None


def run(query, key, value, map_query, map_key, log_mix, scaling, window, sinks, valid, state, keep_state):
    allowed = Mask(query.shape[2], key.shape[2], valid).matrix(query.device)
    q, k, v = (t.to(compute_dtype(query.dtype)) for t in (query, key, value))
    weights = hybrid_weights(q, k, allowed, map_query, map_key, log_mix, scaling, window, sinks)
    return mix(weights, v).to(query.dtype), None


def hybrid_weights(query, key, allowed, map_query, map_key, log_mix, scaling, window, sinks) -> Tensor:
    """Return what each row takes of each value, `[B, H, T, S]`, among the keys that `allowed` leaves it."""
    logs, _ = log_terms(query, key, allowed, map_query, map_key, log_mix, scaling, window, sinks)
    return torch.softmax(logs, dim=-1).nan_to_num(0.0)


def log_terms(
    query: Tensor,
    key: Tensor,
    allowed: Tensor,
    map_query: FeatureMap,
    map_key: FeatureMap,
    log_mix: Tensor,
    scaling: float,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    """Return the logs of the terms of both sums, `[B, H, T, S]`, and which of these terms stand in the window."""
    inside = near(allowed, window, sinks)
    features, left_out = map_query.beside_softmax(query)
    kernel = scores(features, map_key(key))
    outside = log_scale(query, log_mix, left_out) + log_of_mass(kernel)
    logs = torch.where(inside, scores(query, key) * scaling, outside)
    return logs.masked_fill(~allowed | (~inside & (kernel <= NO_MASS)), float("-inf")), inside


def log_scale(query: Tensor, log_mix: Tensor, left_out: Tensor | None) -> Tensor:
    """Return the log of the factor of the linear term in each row, `[B, H, T, 1]`."""
    of_heads = log_mix.to(query.dtype)[:, None, None].expand(*query.shape[:3], 1)
    return of_heads if left_out is None else of_heads + left_out


def one_for_none(mass: Tensor) -> Tensor:
    """Return the mass, 1 where there is none."""
    return mass.masked_fill(mass <= NO_MASS, 1)


def log_of_mass(mass: Tensor) -> Tensor:
    """Return the log, 0 where there is no mass: there is nothing to weigh, and no gradient to spoil."""
    return one_for_none(mass).log()
