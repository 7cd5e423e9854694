"""Softmax attention through the same seam as every variant: the control.

o_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij). Vaswani et al., "Attention is all you need", 2017.
"""

import torch
import torch.nn.functional as F

from ..ops.heads import scores
from .base import Attention
from .registry import register


@register
class Softmax(Attention):
    """torch's scaled_dot_product_attention."""

    name = "softmax"
    formula = "sum_j exp(s_ij) v_j / sum_j exp(s_ij)"
    cost = "O(n^2 d)"
    cost_class = "quadratic"
    source = "Vaswani 2017"
    control = True
    dense_masks = True

    def weights(self, query, key, allowed, scaling):
        s = scores(query * scaling, key).masked_fill(~allowed, float("-inf"))
        return torch.softmax(s, dim=-1).nan_to_num(0.0)

    def forward(self, query, key, value, mask, scaling, state=None):
        plain = mask.dense is None and mask.valid is None
        # torch's is_causal aligns the diagonal to the upper left: right only where there is no past.
        causal = plain and mask.query_length > 1 and mask.offset == 0
        everything = plain and mask.query_length == 1
        allowed = None if causal or everything else mask.matrix(query.device)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
