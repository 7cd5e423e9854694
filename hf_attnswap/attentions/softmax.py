"""Compute softmax attention through the same seam as every variant: the control.

o_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij). Vaswani et al., "Attention is all you need", 2017.
"""

from ..ops.softmax import softmax_attention
from ..ops.softmax.reference import SOFTMAX
from .registry import register
from .scores import ScoreAttention


@register
class Softmax(ScoreAttention):
    """Call the op `softmax`, on most devices torch's; tiles of rows serve a soft cap or sinks, which it lacks."""

    name = "softmax"
    formula = "sum_j exp(s_ij) v_j / sum_j exp(s_ij)"
    source = "Vaswani 2017"
    control = True
    ops = ("softmax", "scores")

    def activation(self):
        return SOFTMAX

    def forward(self, query, key, value, mask, scaling, state=None, dropout=0.0):
        """Return the output of softmax attention.

        Arguments as in `Attention.forward`; `state` has no effect.

        Args:
            dropout: probability of a weight to be dropped.

        Raises:
            NotImplementedError: dropout together with a soft cap or sinks.
        """
        if mask.softcap is None and mask.sinks is None:
            return softmax_attention(query, key, value, mask, scaling, dropout=dropout)
        if dropout:
            raise NotImplementedError(f"attention dropout {dropout} together with {mask} is not supported")
        return super().forward(query, key, value, mask, scaling, state)
