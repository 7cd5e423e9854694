"""Compute softmax attention through the same seam as every variant: the control.

o_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij). Vaswani et al., "Attention is all you need", 2017.
"""

import torch
import torch.nn.functional as F

from ..ops.spec import Activation, by_total
from .registry import register
from .scores import ScoreAttention


def exp_below_peak(scores, count, peak):
    """Return `exp(s - peak)`: the largest weight of a row is 1."""
    return torch.exp(scores - peak.clamp(min=torch.finfo(scores.dtype).min))


@register
class Softmax(ScoreAttention):
    """Call torch's scaled_dot_product_attention; use tiles of rows for a soft cap or sinks, which torch's lacks."""

    name = "softmax"
    formula = "sum_j exp(s_ij) v_j / sum_j exp(s_ij)"
    source = "Vaswani 2017"
    control = True

    def activation(self):
        return Activation("exp", exp_below_peak, denominator=by_total(), needs_peak=True)

    def forward(self, query, key, value, mask, scaling, state=None, dropout=0.0):
        """Return the output of softmax attention, by torch's scaled_dot_product_attention where it can.

        Arguments as in `Attention.forward`; `state` has no effect.

        Args:
            dropout: probability of a weight to be dropped.

        Raises:
            NotImplementedError: dropout together with a soft cap or sinks.
        """
        if mask.softcap is not None or mask.sinks is not None:
            if dropout:
                raise NotImplementedError(f"attention dropout {dropout} together with {mask} is not supported")
            return super().forward(query, key, value, mask, scaling, state)
        free = mask.plain and mask.valid is None
        # torch's is_causal aligns the diagonal to the upper left: right only where there is no past.
        causal = free and mask.causal and mask.query_length > 1 and mask.offset == 0
        everything = free and (mask.query_length == 1 or not mask.causal)
        allowed = None if causal or everything else mask.matrix(query.device)
        if mask.bias is not None:
            allowed = mask.bias.to(query.dtype).masked_fill(~allowed, float("-inf"))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed,
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
