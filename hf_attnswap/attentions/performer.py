"""Compute linear attention by positive random features, whose products are exp(s) in the mean.

phi(x) = exp(w x - |x|^2 / 2) / sqrt(m), x the query or key times sqrt(scaling); the m rows w are fixed, random, of
length sqrt(d), and orthogonal in blocks of d. Choromanski et al., "Rethinking attention with performers" (FAVOR+),
2021. The variance grows with exp(|x|^2), so on the large queries and keys of pretrained models it needs many features
or training.
"""

import math

import torch
from torch import Tensor

from ..ops.spec import FeatureMap
from .base import Option
from .linear import LinearAttention
from .registry import register

# exp of more than this would overflow in sums of float32; only a key that points along w gets near.
_LARGEST_EXPONENT = 60.0


@register
class Performer(LinearAttention):
    """Approximate softmax by random features; trains nothing."""

    name = "performer"
    formula = "phi(q_i) S_i / (phi(q_i) z_i + eps), phi = exp(wx - |x|^2/2) / sqrt(m)"
    cost = "O(n d m)"
    source = "Choromanski 2021 (FAVOR+)"
    scaled = True
    hybrid = False  # it works on scaled queries and keys; beside a softmax the maps see them as they are
    eps = 1e-20  # far keys have features that small
    features = Option(256, "random features m", minimum=1)
    seed = Option(0, "of the random rows w", minimum=0)

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        self.register_buffer("projection", torch.empty(self.features, heads.head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        if getattr(self.projection, "_is_hf_initialized", False):  # loaded from a checkpoint
            return
        dim, generator = self.heads.head_dim, torch.Generator().manual_seed(self.seed)
        blocks = [torch.randn(dim, dim, generator=generator) for _ in range(-(-self.features // dim))]
        rows = torch.cat([torch.linalg.qr(block).Q.T for block in blocks])[: self.features]
        self.projection.copy_(rows * math.sqrt(dim))

    def feature_map_of_queries(self):
        return FeatureMap("performer", query_features, tensors={"projection": self.projection})

    def feature_map_of_keys(self):
        return FeatureMap("performer", key_features, tensors={"projection": self.projection})


def exponents(x: Tensor, projection: Tensor) -> Tensor:
    """Return `w x - |x|^2 / 2`, `[B, heads, t, D]` -> `[B, heads, t, m]`."""
    return x @ projection.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2


def query_features(x: Tensor, projection: Tensor) -> Tensor:
    """Return the features, `[B, heads, t, D]` -> `[B, heads, t, m]`, over the largest of the row, which cancels."""
    e = exponents(x, projection)
    return (e - e.amax(-1, keepdim=True).detach()).exp() / math.sqrt(len(projection))


def key_features(x: Tensor, projection: Tensor) -> Tensor:
    """Return the features, `[B, heads, t, D]` -> `[B, heads, t, m]`; exponents are cut at 60, for sums in float32."""
    return exponents(x, projection).clamp(max=_LARGEST_EXPONENT).exp() / math.sqrt(len(projection))
