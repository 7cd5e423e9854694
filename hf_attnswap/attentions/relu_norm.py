"""Divide an activation on the scores by the sum of the weights: o_i = sum_j a(s_ij) v_j / (sum_j a(s_ij) + eps).

Shen et al., "A study on ReLU and softmax in transformer", 2023. O(n^2), as every activation on the scores.
"""

from ..ops.spec import Activation, by_total
from .gain import GainedScores
from .registry import register
from .relu import relu, softplus, squared_relu

EPS = 1e-6


@register
class ReluNorm(GainedScores):
    """Weigh values by relu(s) over its sum; a row that has no positive score is zero."""

    name = "relu_norm"
    formula = "sum_j relu(s_ij) v_j / (sum_j relu(s_ij) + eps)"
    source = "Shen 2023"

    def activation(self):
        return Activation("relu", relu, denominator=by_total(EPS))


@register
class Relu2Norm(GainedScores):
    """Weigh values by relu(s)^2 over its sum: the square prefers large scores, as exp does."""

    name = "relu2_norm"
    formula = "sum_j relu(s_ij)^2 v_j / (sum_j relu(s_ij)^2 + eps)"
    source = "relu_norm, squared"

    def activation(self):
        return Activation("relu2", squared_relu, denominator=by_total(EPS))


@register
class SoftplusNorm(GainedScores):
    """Weigh values by log(1 + e^s) over its sum: no row is zero."""

    name = "softplus_norm"
    formula = "sum_j softplus(s_ij) v_j / (sum_j softplus(s_ij) + eps)"
    source = "relu_norm, smooth"

    def activation(self):
        return Activation("softplus", softplus, denominator=by_total(EPS))
