"""ReLU on the scores, divided by the number of keys: o_i = sum_j relu(s_ij) v_j / n_i^alpha.

Wortsman et al., "Replacing softmax with ReLU in vision transformers", 2023 (relu/L); for causal rows n_i is the
number of keys that the row may attend to. The activation stands on the product of q and k: O(n^2) remains.
"""

import torch
from torch import nn

from ..ops.heads import scores
from .base import Option, ScoreAttention
from .registry import register


@register
class Relu(ScoreAttention):
    """Unnormalised: rows do not sum to one, and the scale of the output depends on the text."""

    name = "relu"
    formula = "sum_j relu(s_ij) v_j / n_i^alpha"
    source = "Wortsman 2023"
    alpha = Option(1.0, "exponent of the number of keys in the denominator", minimum=0.0)
    gain = Option(False, "learn a factor per head on the output, 1 at the start")

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        if self.gain:
            self.output_gain = nn.Parameter(torch.empty(heads.num_attention_heads))
            self.reset_parameters()

    def reset_parameters(self):
        if self.gain:
            nn.init.ones_(self.output_gain)

    def weights(self, query, key, allowed, scaling):
        count = allowed.sum(-1, keepdim=True).clamp(min=1).to(query.dtype)
        weights = torch.relu(scores(query * scaling, key)).masked_fill(~allowed, 0) / count**self.alpha
        return weights * self.output_gain.to(weights.dtype)[:, None, None] if self.gain else weights
