"""Compute softmax from the whole matrix of weights: O(n^2) time and memory, in float64 where the inputs are."""

import torch

from ..heads import mix
from ..scores.reference import score_weights
from ..spec import Activation, by_total


def exp_below_peak(scores, count, peak):
    """Return `exp(s - peak)`: the largest weight of a row is 1."""
    return torch.exp(scores - peak.clamp(min=torch.finfo(scores.dtype).min))


SOFTMAX = Activation("exp", exp_below_peak, denominator=by_total(), needs_peak=True)


def unfit(query, key, value, mask, scaling, dropout):
    """Return why this form cannot serve a call with dropout, in words; None for all other calls."""
    return "the formula drops no weights" if dropout else None


def run(query, key, value, mask, scaling, dropout):
    """Return what `softmax_attention` returns; takes its arguments in order."""
    return mix(score_weights(query, key, mask, scaling, SOFTMAX), value).to(query.dtype)
