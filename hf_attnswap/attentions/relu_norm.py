"""An activation on the scores, normalised by its own sum: o_i = sum_j a(s_ij) v_j / (sum_j a(s_ij) + eps).

Shen et al., "A study on ReLU and softmax in transformer", 2023. O(n^2), as every activation on the scores.
"""

import torch.nn.functional as F

from .gain import GainedScores
from .registry import register


class NormalisedScores(GainedScores):
    """Rows sum to one where any weight is positive, and are zero otherwise."""

    needs_total = True
    eps = 1e-6

    def denominator(self, total, count):
        return total + self.eps


@register
class ReluNorm(NormalisedScores):
    """A row that has no positive score is zero."""

    name = "relu_norm"
    formula = "sum_j relu(s_ij) v_j / (sum_j relu(s_ij) + eps)"
    source = "Shen 2023"

    def activate(self, scores, count, peak, heads):
        return scores.relu_()


@register
class Relu2Norm(NormalisedScores):
    """The square prefers large scores, as exp does."""

    name = "relu2_norm"
    formula = "sum_j relu(s_ij)^2 v_j / (sum_j relu(s_ij)^2 + eps)"
    source = "relu_norm, squared"

    def activate(self, scores, count, peak, heads):
        return scores.relu_().square()


@register
class SoftplusNorm(NormalisedScores):
    """log(1 + e^s): no row is zero."""

    name = "softplus_norm"
    formula = "sum_j softplus(s_ij) v_j / (sum_j softplus(s_ij) + eps)"
    source = "relu_norm, smooth"

    def activate(self, scores, count, peak, heads):
        return F.softplus(scores)
