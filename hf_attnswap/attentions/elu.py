"""Linear attention with phi(x) = elu(x) + 1. Katharopoulos et al., "Transformers are RNNs", 2020."""

import torch

from .base import LinearAttention
from .registry import register


@register
class Elu(LinearAttention):
    """phi is positive: exp(x) below zero, x + 1 above."""

    name = "elu"
    formula = "phi(q_i) S_i / (phi(q_i) z_i + eps), phi = elu(x) + 1"
    cost = "O(n d^2)"
    source = "Katharopoulos 2020"

    def feature_map(self, x):
        # elu(x) + 1 in half the passes over memory of torch's elu followed by an addition.
        return x.clamp(max=0).exp() + torch.relu(x)
