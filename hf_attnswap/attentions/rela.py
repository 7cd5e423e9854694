"""Compute rectified linear attention: o_i = RMSNorm(sum_j relu(s_ij) v_j), per head, with an optional gate.

The norm takes the place of the denominator: u g / sqrt(mean u^2 + eps), g a gain per channel. With `gate` the normed
output is multiplied by sigmoid(w u), channel by channel. Zhang et al., "Sparse attention with linear units", 2021.
O(n^2).
"""

import torch
from torch import nn

from ..ops.heads import compute_dtype, mix, scores
from ..ops.scores import score_attention
from ..ops.spec import Activation
from .base import Option
from .registry import register
from .relu import relu
from .scores import ScoreAttention


@register
class Rela(ScoreAttention):
    """Normalise the output of ReLU weights by its size; `weights` are those before the norm."""

    name = "rela"
    formula = "RMSNorm(sum_j relu(s_ij) v_j)"
    source = "Zhang 2021 (ReLA)"
    eps = 1e-6
    gate = Option(False, "multiply the result u by sigmoid(w u), w learned per channel")

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        self.norm_gain = nn.Parameter(torch.empty(heads.num_attention_heads, heads.value_dim))
        if self.gate:
            self.gate_weight = nn.Parameter(torch.empty(heads.num_attention_heads, heads.value_dim))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.norm_gain)
        if self.gate:
            nn.init.zeros_(self.gate_weight)

    def activation(self):
        return Activation("relu", relu)

    def normalised(self, out):
        """Return RMSNorm of `[B, H, T, Dv]`, times the gate."""
        normed = out * (out.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        normed = normed * self.norm_gain.to(out.dtype)[:, None, :]
        return normed * torch.sigmoid(out * self.gate_weight.to(out.dtype)[:, None, :]) if self.gate else normed

    def reference(self, query, key, value, mask, scaling):
        return self.normalised(super().reference(query, key, value, mask, scaling))

    def forward(self, query, key, value, mask, scaling, state=None):
        dtype = compute_dtype(query.dtype)  # the sum may be too large for float16; the norm brings it back
        out = score_attention(query, key, value, mask, scaling, self.activation(), result_dtype=dtype)
        return self.normalised(out).to(query.dtype)

    @torch.no_grad()
    def calibrate(self, query, key, value, mask, scaling):
        """Set the gain of each head so that its output has the size that the output of softmax has there."""
        s = scores(query.float() * scaling, key.float()).masked_fill(~mask.matrix(query.device), float("-inf"))
        softmax = mix(s.softmax(-1).nan_to_num(0.0), value.float())
        size = softmax.square().mean((0, 2, 3)).sqrt() * (2 if self.gate else 1)  # a new gate is one half
        self.norm_gain.copy_(size[:, None].expand_as(self.norm_gain))
