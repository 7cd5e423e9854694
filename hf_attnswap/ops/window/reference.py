"""Compute the formula over whole matrices: O(n^2) time and memory, in float64 where the inputs are; without a state."""

from torch import Tensor

from ...masks import Mask
from ..heads import compute_dtype, mix, scores, softmax_of_seen


def unfit(query, key, value, scaling, window, sinks, valid, state, keep_state, reach):
    """Return why this form cannot serve a call that takes or keeps a state, in words; None for all other calls."""
    return "the formula over whole matrices keeps no state for generation" if state is not None or keep_state else None


def run(query, key, value, scaling, window, sinks, valid, state, keep_state, reach):
    """Return what `window_attention` returns, and None for the state, from the whole matrix of weights; O(n^2) memory.

    Takes the arguments of `window_attention` in order; differentiable by autograd.
    """
    mask = Mask(query.shape[2], key.shape[2], valid, window=reach)
    q, k, v = (t.to(compute_dtype(query.dtype)) for t in (query, key, value))
    return mix(window_weights(q, k, mask, scaling, window, sinks), v).to(query.dtype), None


def window_weights(query: Tensor, key: Tensor, mask: Mask, scaling: float, window: int, sinks: int) -> Tensor:
    """Return what each row takes of each value, `[B, H, T, S]`, among the keys that `mask` leaves the row.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`.
        scaling, window, sinks: as in `window_attention`.
    """
    s = scores(query * scaling, key)
    s = s.masked_fill(~near(mask.matrix(query.device), window, sinks, mask.places(query.device)), float("-inf"))
    return softmax_of_seen(s)


def near(allowed: Tensor, window: int, sinks: int, places: Tensor | None = None) -> Tensor:
    """Return which of the keys that each row may attend to are among the last `window` or the first `sinks`; O(n^2).

    Args:
        allowed: bool `[..., T, S]`; the output has the same shape.
        places: of the keys in their text, from 1, `[..., 1, S]`; None where a row may attend to all keys of its text
            that do not come later, so that these tell.
    """
    rank = allowed.long().cumsum(-1)
    count = rank[..., -1:]
    return allowed & ((rank > count - window) | ((rank if places is None else places) <= sinks))
