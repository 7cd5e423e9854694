"""Compute linear attention with relu features and a cosine that prefers near keys.

The weight of key j in row i is relu(q_i) . relu(k_j) cos(pi/2 (i - j) / M), which re-associates because
cos(a - b) = cos a cos b + sin a sin b. M is `max_length`; positions count the tokens that are not padding.
Qin et al., "cosFormer: rethinking softmax in attention", 2022.
"""

import math

import torch
from torch import Tensor

from ..masks import values_are_hidden
from ..ops.programs import transformed
from ..ops.spec import FeatureMap
from .base import Option
from .linear import LinearAttention, positions
from .registry import register


@register
class Cosformer(LinearAttention):
    """Weigh keys by relu features and a cosine of the distance; refuses texts of more than `max_length` tokens.

    Beyond that length the cosines would be negative.
    """

    name = "cosformer"
    formula = "phi(q_i) S_i / (phi(q_i) z_i + eps), phi = relu(x) [cos, sin](pi/2 i/M)"
    cost = "O(n d 2d)"
    source = "Qin 2022"
    kinds = ("causal", "bidirectional")
    hybrid = False  # its features know their position, which the tokens that leave a window have lost
    max_length = Option(8192, "the longest text M, in tokens", minimum=256)

    def prepare(self, query, key, mask, state):
        """Return query and key with the angle of their position as one more number, `[..., D + 1]`.

        The dtype is float32 or wider, to hold the angle. With a `state`, `state["count"]` becomes the number of tokens
        so far.

        Raises:
            NotImplementedError: a text of more than `max_length` tokens.
        """
        position = positions(key, None if mask.valid is None else mask.valid[:, -key.shape[2] :], state)
        if values_are_hidden() and not transformed():  # a program sees no numbers: what it becomes looks
            torch._assert_async(position.max() < self.max_length, f"a text is longer than max_length={self.max_length}")
        elif (last := key.shape[2] if transformed() else int(position.max()) + 1) > self.max_length:
            raise NotImplementedError(f"a text of {last} tokens is longer than max_length={self.max_length}")
        if state is not None:
            state["count"] = position[:, -1] + 1
        dtype = torch.promote_types(query.dtype, torch.float32)
        angle = (position.clamp(min=0).to(dtype) * (math.pi / 2 / self.max_length))[:, None, :, None]
        # The queries are those of the last keys.
        angles = ((x, angle[:, :, -x.shape[2] :]) for x in (query, key))
        return tuple(torch.cat([x.to(dtype), angle.expand(*x.shape[:-1], 1)], dim=-1) for x, angle in angles)

    def feature_map(self):
        return COSFORMER


def cosformer_features(x: Tensor) -> Tensor:
    """Return the features of queries or keys, `[..., D + 1]` -> `[..., 2 D]`.

    Args:
        x: the last number is the angle of the token's position.
    """
    features, angle = torch.relu(x[..., :-1]), x[..., -1:]
    return torch.cat([features * angle.cos(), features * angle.sin()], dim=-1)


COSFORMER = FeatureMap("cosformer", cosformer_features)
