"""Compute attention without an activation: o_i = sum_j s_ij v_j / n_i = q_i (sum_j k_j v_j^T) / n_i.

The product re-associates, (Q K^T) V = Q (K^T V): this, not an activation on the scores, is what makes it O(n).
"""

from ..ops.spec import FeatureMap
from .linear import LinearAttention
from .registry import register


@register
class Identity(LinearAttention):
    """Weigh values by the scores as they are; weights are signed and do not sum to one."""

    name = "identity"
    formula = "sum_j s_ij v_j / n_i"
    cost = "O(n d^2)"
    source = "the activation left out"
    scaled = True
    divide_by_count = True
    hybrid = False  # its weights may be negative: no denominator to share with softmax

    def feature_map(self):
        return IDENTITY


def unchanged(x):
    """Return x."""
    return x


IDENTITY = FeatureMap("identity", unchanged)
