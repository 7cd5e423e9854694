"""Compute softmax by plain products, in few nodes of ONNX and without repeating keys; O(n^2) memory."""

import torch

from ..heads import mix, scores


def unfit(query, key, value, mask, scaling, dropout):
    """Return why this form cannot serve a call with dropout, in words; None for all other calls."""
    return "the graph drops no weights" if dropout else None


def run(query, key, value, mask, scaling, dropout):
    """Return what `softmax_attention` returns; a row that may attend to nothing is the mean of all values."""
    s = scores(query * scaling, key)
    s = s if mask.bias is None else s + mask.bias
    # The lowest number in place of -inf: no number of a row of padding would reach the states of linear layers.
    s = torch.where(mask.matrix(query.device), s, torch.finfo(s.dtype).min)
    return mix(s.softmax(-1), value)
