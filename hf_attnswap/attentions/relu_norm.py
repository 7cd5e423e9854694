"""An activation on the scores, normalised by its own sum: o_i = sum_j a(s_ij) v_j / (sum_j a(s_ij) + eps).

Shen et al., "A study on ReLU and softmax in transformer", 2023. O(n^2), as every activation on the scores.
"""

import torch
import torch.nn.functional as F

from .base import ScoreAttention
from .registry import register


class NormalisedScores(ScoreAttention):
    """Rows sum to one where any weight is positive, and are zero otherwise."""

    eps = 1e-6

    def activation(self, scores: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} defines no activation")

    def activate(self, scores, allowed):
        a = self.activation(scores).masked_fill(~allowed, 0)
        return a / (a.sum(-1, keepdim=True) + self.eps)


@register
class ReluNorm(NormalisedScores):
    """A row that has no positive score is zero."""

    name = "relu_norm"
    formula = "sum_j relu(s_ij) v_j / (sum_j relu(s_ij) + eps)"
    source = "Shen 2023"

    def activation(self, scores):
        return torch.relu(scores)


@register
class Relu2Norm(NormalisedScores):
    """The square prefers large scores, as exp does."""

    name = "relu2_norm"
    formula = "sum_j relu(s_ij)^2 v_j / (sum_j relu(s_ij)^2 + eps)"
    source = "relu_norm, squared"

    def activation(self, scores):
        return torch.relu(scores).square()


@register
class SoftplusNorm(NormalisedScores):
    """log(1 + e^s): no row is zero."""

    name = "softplus_norm"
    formula = "sum_j softplus(s_ij) v_j / (sum_j softplus(s_ij) + eps)"
    source = "relu_norm, smooth"

    def activation(self, scores):
        return F.softplus(scores)
