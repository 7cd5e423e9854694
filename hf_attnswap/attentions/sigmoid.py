"""Compute attention by a sigmoid on the scores: o_i = sum_j sigmoid(s_ij + b_i) v_j.

b_i = -log n_i + a learned offset per head. Ramapuram et al., "Theory, analysis, and best practices for sigmoid
self-attention", 2024. O(n^2).
"""

import torch
from torch import nn

from ..ops.spec import Activation
from .gain import GainedScores
from .registry import register


@register
class Sigmoid(GainedScores):
    """Weigh each value by itself: no sum over the row is needed, and rows do not sum to one."""

    name = "sigmoid"
    formula = "sum_j sigmoid(s_ij + b) v_j, b = -log n_i + offset"
    source = "Ramapuram 2024"

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        self.offset = nn.Parameter(torch.empty(heads.num_attention_heads))
        self.reset_parameters()

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.zeros_(self.offset)

    def activation(self):
        return Activation("sigmoid", shifted_sigmoid, tensors={"offset": self.offset})


def shifted_sigmoid(scores, count, peak, offset):
    """Return `sigmoid(s + offset_h - log n_i)`, written over the scores.

    Args:
        scores: `[..., h, t, s]`; count: n_i; peak: not read; offset: `[h]`.
    """
    bias = offset.to(scores.dtype)[:, None, None] - count.to(scores.dtype).log()
    return scores.add_(bias).sigmoid_()
