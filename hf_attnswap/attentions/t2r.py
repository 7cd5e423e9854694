"""Compute linear attention with a learned map and a ReLU: phi(x) = relu(W x + b), W and b per head.

Queries and keys have separate W, the identity at the start (`relu_kernel`). Kasai et al., "Finetuning pretrained
transformers into RNNs", 2021, where W starts at random.
"""

import torch
from torch import Tensor, nn

from ..ops.spec import FeatureMap
from .linear import LinearAttention
from .registry import register


class T2RMap(nn.Module):
    """Hold the parameters of a map. W = 1 + `delta` (`[heads, D, D]`), so that weight decay draws W to the identity."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.delta = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(heads, 1, head_dim))
        self.reset_parameters()

    def reset_parameters(self):
        """Set W to the identity and b to 0."""
        nn.init.zeros_(self.delta)
        nn.init.zeros_(self.bias)

    def forward(self) -> FeatureMap:
        """Return the map as it stands, for an op; by a call, which brings offloaded weights in."""
        return FeatureMap("t2r", t2r_features, tensors={"delta": self.delta, "bias": self.bias})


def t2r_features(x: Tensor, delta: Tensor, bias: Tensor) -> Tensor:
    """Return relu(Wx + b) with W = 1 + `delta`, `[B, heads, t, D]` -> `[B, heads, t, D]`."""
    return torch.relu(x + x @ delta.to(x.dtype) + bias.to(x.dtype))


@register
class T2R(LinearAttention):
    """Weigh keys by features relu(Wx + b) with learned W and b; needs training."""

    name = "t2r"
    formula = "phi(q_i) S_i / (phi(q_i) z_i + eps), phi = relu(Wx + b)"
    cost = "O(n d^2)"
    source = "Kasai 2021 (T2R)"
    family = "maps"

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        self.query_map = T2RMap(heads.num_attention_heads, heads.head_dim)
        self.key_map = T2RMap(heads.num_key_value_heads, heads.head_dim)

    def feature_map_of_queries(self):
        return self.query_map()

    def feature_map_of_keys(self):
        return self.key_map()
