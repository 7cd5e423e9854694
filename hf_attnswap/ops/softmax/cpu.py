"""Compute softmax by the CPU kernels of the scores, where that is faster than torch's scaled_dot_product_attention."""

import torch

from ... import native
from ..scores import cpu as scores
from .reference import SOFTMAX

devices = ("cpu",)
dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
available = native.missing

# Scores of a head from which on it pays: those of a text, and those of one row.
_OF_TEXT, _OF_ROW = 1 << 14, 1 << 9


def unfit(query, key, value, mask, scaling, dropout):
    """Return why the kernel cannot serve the call, or would be slower than torch, in words, or None."""
    if dropout:
        return "the kernel drops no weights"
    if torch.compiler.is_compiling():
        return "torch compiles its own form"
    if not mask.causal:
        return "torch is as fast where each row sees all keys"
    rows, keys = query.shape[2], key.shape[2]
    if rows * keys < (_OF_ROW if rows == 1 else _OF_TEXT):
        return "torch is as fast for few scores"
    if rows == 1 and not scores.fits_row(query, key, value):
        return "the kernel for one row takes float32 and whole vectors of 16 numbers"
    return scores.unfit(query, key, value, mask, scaling, SOFTMAX, None, query.dtype)


def run(query, key, value, mask, scaling, dropout):
    """Return what `softmax_attention` returns; takes its arguments in order."""
    return scores.run(query, key, value, mask, scaling, SOFTMAX, None, query.dtype)
