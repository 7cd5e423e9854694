"""Define the family of linear variants: a feature map on queries and one on keys make attention O(n)."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..masks import Mask
from ..ops.heads import in_dtype, scores
from ..ops.linear import causal_linear, full_linear
from ..ops.spec import FeatureMap
from .base import Attention, Option
from .counting import of_map, pairs
from .within import within_window

UNROTATE = Option(
    False,
    "phi(R^-1 q), phi(R^-1 k) with R the layer's rotation by position (RoPE), for texts longer than the training's",
)
HALF_LIFE = Option(
    0.0,
    "h, for 2^(-(i - j) / h) phi(q_i) phi(k_j), beside a window for 2^(-(i - w - j) / h) phi(q_i) phi(k_j): the tokens "
    "after which a key counts half, where each key/value head starts to learn its own; 0 lets none fade",
    minimum=0,
)


class Decay(nn.Module):
    """Hold the half-life of each key/value head, in tokens: `half_life e^p`, with p = 0 at the start.

    Attributes:
        log_factor: p, `[Hkv]`.
    """

    def __init__(self, heads: int, half_life: float):
        super().__init__()
        self.half_life = half_life
        self.log_factor = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self):
        """Set every head to the half-life that was asked for."""
        nn.init.zeros_(self.log_factor)

    def forward(self) -> Tensor:
        """Return the log of what remains of a key after one token, `[Hkv]`; no half-life is shorter than one token."""
        dtype = torch.promote_types(self.log_factor.dtype, torch.float32)
        half_lives = (self.log_factor.to(dtype) + math.log(self.half_life)).exp().clamp(min=1)
        return -math.log(2) / half_lives


class LinearAttention(Attention):
    """Replace `exp(s)` by `phi(q) . phi(k)`: the product re-associates, which makes time and memory O(n).

    `o_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps)`, or / n_i where `divide_by_count`. A variant
    of this family writes `feature_map`, or the two others where queries and keys differ.

    With a half-life h, causal attention has `d^{i - j} phi(q_i).phi(k_j)` with d = 2^(-1/h) in place of the product; i
    and j count the tokens that are not padding. Without the rotation, phi sees query and key before it. In a layer with
    a sliding window W the sums go over the keys i - W + 1 to i (`within.py`).

    Attributes:
        scaled: the maps see query and key times sqrt(scaling), not as they are.
        divide_by_count: divide by the number of keys in place of the sum of the weights.
        hybrid: whether there is an `X+window`.
        eps: added to the sum of the weights.
        decay: of the key/value heads; None where the half-life is 0.
    """

    cost_class = "linear"
    stateful = True
    slides = True
    ops = ("linear",)
    scaled: ClassVar[bool] = False
    divide_by_count: ClassVar[bool] = False
    hybrid: ClassVar[bool] = True
    eps: ClassVar[float] = 1e-6
    unrotate = UNROTATE
    half_life = HALF_LIFE

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        self.decay = Decay(heads.num_key_value_heads, self.half_life) if self.half_life else None
        if self.decay is not None:
            self.kinds = ("causal",)

    def log_decay(self) -> Tensor | None:
        """Return the log of the decay of each key/value head, `[Hkv]`; None where nothing fades."""
        return None if self.decay is None else self.decay()

    def feature_map(self) -> FeatureMap:
        """Return the map that queries and keys share, with the parameters that it needs."""
        raise NotImplementedError(f"{type(self).__name__} defines no feature map")

    def feature_map_of_queries(self) -> FeatureMap:
        """Return the map of the queries, `[B, H, t, D]` -> `[B, H, t, F]`."""
        return self.feature_map()

    def feature_map_of_keys(self) -> FeatureMap:
        """Return the map of the keys, `[B, Hkv, t, D]` -> `[B, Hkv, t, F]`."""
        return self.feature_map()

    def kernel(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """Return `phi(q_i) . phi(k_j)`, `[B, H, T, S]`: O(n^2), for the definition.

        Args:
            query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`. scaling: as in `forward`.
        """
        scale = scaling**0.5 if self.scaled else 1.0
        return scores(self.feature_map_of_queries()(query * scale), self.feature_map_of_keys()(key * scale))

    def weights(self, query, key, mask, scaling):
        allowed = mask.matrix(query.device)
        kernel = self.kernel(*self.prepare(*unrotated(self, query, key, mask), mask, None), scaling)
        kernel = kernel.masked_fill(~allowed, 0)
        log_decay = self.log_decay()
        if log_decay is not None:
            rank = allowed.long().cumsum(-1)
            log_decay = log_decay.to(kernel.dtype).repeat_interleave(query.shape[1] // key.shape[1])
            kernel = kernel * ((rank[..., -1:] - rank) * log_decay[:, None, None]).exp()
        if self.divide_by_count:
            return kernel / allowed.sum(-1, keepdim=True).clamp(min=1)
        return kernel / (kernel.sum(-1, keepdim=True) + self.eps)

    def operations(self, rows, keys, window=None):
        """Return the operations of the maps, and of the products of features and values.

        Each text has a state per key/value head, to which its keys are added, and from which its queries read; in a
        layer with a sliding window the weights are computed one by one.
        """
        heads, map_of_queries, map_of_keys = self.heads, self.feature_map_of_queries(), self.feature_map_of_keys()
        device = next((t.device for t in map_of_queries.tensors.values()), torch.device("cpu"))
        query = torch.zeros(1, heads.num_attention_heads, 1, heads.head_dim, device=device)
        query, key = self.prepare(query, query[:, : heads.num_key_value_heads], Mask(1, 1), None)
        (features, of_queries), (_, of_keys) = of_map(map_of_queries, query), of_map(map_of_keys, key)
        maps = of_queries * rows + of_keys * (rows if window is None or self.kind != "causal" else keys)
        if window is not None and window < keys and self.kind == "causal":
            seen = pairs(rows, keys, window=window)
            return maps + 2 * seen * heads.num_attention_heads * (features + heads.value_dim)
        sums = heads.value_dim + (0 if self.divide_by_count else 1)
        return maps + 2.0 * rows * (heads.num_attention_heads + heads.num_key_value_heads) * features * sums

    def prepare(self, query: Tensor, key: Tensor, mask: Mask, state: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return query and key as the maps take them, for variants whose maps need more than each token by itself."""
        return query, key

    def forward(self, query, key, value, mask, scaling, state=None):
        if mask.window is not None:
            return within_window(self, query, key, value, mask, scaling, state)
        dtype = query.dtype
        query, key = self.prepare(*unrotated(self, query, key, mask), mask, state)
        maps = self.feature_map_of_queries(), self.feature_map_of_keys()
        given = {
            "scale": scaling**0.5 if self.scaled else 1.0,
            "eps": None if self.divide_by_count else self.eps,
        }
        if not mask.causal:
            out, _ = full_linear(query, key, value, *maps, **given, key_mask=mask.valid)
            if self.divide_by_count:
                counts = key.shape[2] if mask.valid is None else mask.valid.sum(1).clamp(min=1)[:, None, None, None]
                out = out / counts
            return in_dtype(out, dtype)
        valid = mask.new_tokens()
        before = None if state is None else state.get("S")
        out, _, after = causal_linear(
            query, key, value, *maps, **given, key_mask=valid, state=before, log_decay=self.log_decay()
        )
        if self.divide_by_count:
            out, counts = self._divide(out, query, valid, state)
            if state is not None:
                state["count"] = counts
        if state is not None:
            state["S"] = after
        return in_dtype(out, dtype)

    @staticmethod
    def _divide(numerator, query, valid, state):
        """Return the numerators over n_i, the number of keys seen so far, and n after the last token, `[B]`."""
        counts = positions(query, valid, state) + 1
        after = counts[:, -1].clone()  # not a view of all counts
        return numerator / counts.clamp(min=1)[:, None, :, None].to(numerator.dtype), after


def unrotated(attention: Attention, query: Tensor, key: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Return query and key as they were before their rotation, in float32 (float64 for float64).

    They come back as they are where `attention` does not ask for that, and where `mask` tells of no rotation.
    """
    return mask.unrotated(query, key) if attention.unrotate else (query, key)


def positions(query: Tensor, valid: Tensor | None, state: dict[str, Tensor] | None) -> Tensor:
    """Return how many valid tokens stand before each of the new ones, int `[B, T]`.

    The tokens in `state["count"]` are included. Padding has the position of the valid token before it (-1 where there
    is none).

    Args:
        query: `[B, H, T, D]`, for its shape. valid: bool `[B, T]`; None where every token is valid.
        state: of the layer; None or without "count" at the start of a text.
    """
    batch, _, length, _ = query.shape
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.long, device=query.device)
    before = 0 if state is None or "count" not in state else state["count"][:, None]
    return valid.long().cumsum(1) - 1 + before
