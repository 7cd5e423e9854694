"""Compute linear attention by the second-order Taylor series of exp on projected queries and keys.

1 + s + s^2 / 2 with s = scaling * (P_q q) . (P_k k): phi(x) = [1, y, y y^T / sqrt(2)], y = P x with r << d numbers, so
phi has 1 + r + r^2. The weights are never negative. Arora et al., "Simple linear attention language models balance the
recall-throughput tradeoff" (Based), 2024.
"""

import math

import torch
from torch import Tensor, nn

from ..ops.spec import FeatureMap
from .base import Option
from .linear import LinearAttention
from .registry import register


@register
class Taylor(LinearAttention):
    """Approximate exp(s) by its Taylor series on learned projections of queries and keys.

    P_q and P_k start as the same random projection, which keeps q . k in the mean (Johnson & Lindenstrauss 1984).
    """

    name = "taylor"
    formula = "phi(q_i) S_i / (phi(q_i) z_i + eps), phi = [1, y, y y^T / sqrt(2)], y = Px"
    cost = "O(n d r^2)"
    source = "Arora 2024 (Based)"
    family = "maps"
    scaled = True
    hybrid = False  # it works on scaled queries and keys; beside a softmax the maps see them as they are
    rank = Option(16, "numbers r that a query or key is projected to", minimum=1)

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        shape = (heads.num_key_value_heads, heads.head_dim, self.rank)
        self.query_projection = nn.Parameter(torch.empty(shape))
        self.key_projection = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self):
        for projection in (self.query_projection, self.key_projection):
            generator = torch.Generator(projection.device if projection.device.type != "meta" else "cpu")
            nn.init.normal_(projection, std=self.rank**-0.5, generator=generator.manual_seed(0))

    def feature_map_of_queries(self):
        return FeatureMap("taylor", taylor_features, tensors={"projection": self.query_projection})

    def feature_map_of_keys(self):
        return FeatureMap("taylor", taylor_features, tensors={"projection": self.key_projection})


def taylor_features(x: Tensor, projection: Tensor) -> Tensor:
    """Return `[1, y, y y^T / sqrt(2)]`, `[B, heads, t, D]` -> `[B, heads, t, 1 + r + r^2]`.

    Args:
        projection: `[Hkv, D, r]`; the heads of x share the projections in equal groups.
    """
    group = x.shape[1] // projection.shape[0]
    y = x @ projection.to(x.dtype).repeat_interleave(group, dim=0)
    square = (y[..., :, None] * y[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(y[..., :1]), y, square], dim=-1)
