"""ReLU on the scores, normalised by its own sum: o_i = sum_j relu(s_ij) v_j / (sum_j relu(s_ij) + eps).

Shen et al., "A study on ReLU and softmax in transformer", 2023. O(n^2), as every activation on the scores.
"""

import torch

from ..ops.heads import scores
from .base import ScoreAttention
from .registry import register


@register
class ReluNorm(ScoreAttention):
    """Rows sum to one where any score is positive, and are zero otherwise."""

    name = "relu_norm"
    formula = "sum_j relu(s_ij) v_j / (sum_j relu(s_ij) + eps)"
    source = "Shen 2023"
    eps = 1e-6

    def weights(self, query, key, allowed, scaling):
        a = torch.relu(scores(query * scaling, key)).masked_fill(~allowed, 0)
        return a / (a.sum(-1, keepdim=True) + self.eps)
