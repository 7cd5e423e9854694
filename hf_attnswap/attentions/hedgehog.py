"""Compute linear attention with a learned map that can imitate softmax's spikes.

phi(x) = [softmax(Wx), softmax(-Wx)], each softmax over the head's features, W per head, the identity at the start;
queries and keys have separate W. Zhang et al., "The hedgehog & the porcupine", 2024, in the form of LoLCATs
(Zhang 2024): two softmaxes, not one joint softmax over [Wx, -Wx]. x is the query or key as the layer has it, not
scaled: the features are then sharp enough to train.
"""

import torch
from torch import Tensor, nn

from ..ops.programs import sizes_are_open
from ..ops.spec import FeatureMap
from .linear import LinearAttention
from .registry import register


class HedgehogMap(nn.Module):
    """Hold the parameters of a map. W = 1 + `delta` (`[heads, D, D]`), so that weight decay draws W to the identity."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.delta = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.reset_parameters()

    def reset_parameters(self):
        """Set W to the identity."""
        nn.init.zeros_(self.delta)

    def forward(self) -> FeatureMap:
        """Return the map as it stands, for an op; by a call, which brings offloaded weights in."""
        return FeatureMap("hedgehog", hedgehog_features, tensors={"delta": self.delta}, beside=hedgehog_beside_softmax)


def hedgehog_mixed(x: Tensor, delta: Tensor) -> Tensor:
    """Return Wx, `[B, heads, t, D]`, with W = 1 + `delta`, `[heads, D, D]`."""
    delta = delta.to(x.dtype)
    if not sizes_are_open(x) and x.shape[2] < x.shape[3]:  # the smaller of the two additions
        return x + x @ delta
    return x @ (delta + torch.eye(x.shape[3], dtype=x.dtype, device=x.device))


def hedgehog_features(x: Tensor, delta: Tensor) -> Tensor:
    """Return `[softmax(Wx), softmax(-Wx)]`, `[B, heads, t, D]` -> `[B, heads, t, 2 D]`."""
    y = hedgehog_mixed(x, delta)
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)


def hedgehog_beside_softmax(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return `[exp(Wx), exp(-Wx)] / e^m`, `[B, heads, t, 2 D]`, and m, `[B, heads, t, 1]`, the largest |Wx| of the row.

    A normalised map would rob the row of its scale, which cancels only where there is no softmax beside the map.
    """
    y = hedgehog_mixed(x, delta)
    largest = y.detach().abs().amax(-1, keepdim=True)
    return torch.cat([y - largest, torch.sub(-largest, y)], dim=-1).exp_(), largest


@register
class Hedgehog(LinearAttention):
    """Imitate softmax with a learned map; needs training, for untrained the map is far from softmax."""

    name = "hedgehog"
    formula = "phi(q_i) S_i / (phi(q_i) z_i + eps), phi = [softmax(Wx), softmax(-Wx)]"
    cost = "O(n d 2d)"
    source = "Zhang 2024 (Hedgehog, LoLCATs)"
    family = "maps"

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        self.query_map = HedgehogMap(heads.num_attention_heads, heads.head_dim)
        self.key_map = HedgehogMap(heads.num_key_value_heads, heads.head_dim)

    def feature_map_of_queries(self):
        return self.query_map()

    def feature_map_of_keys(self):
        return self.key_map()
