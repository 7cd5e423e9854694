"""What the forms of this package are held against beside torch's SDPA, as candidates of hf_attnswap.benchmark."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor


def _per_query_head(query: Tensor, shared: Tensor) -> Tensor:
    """`[B, Hkv, n, D]` -> `[B, H, n, D]`: neither of these knows groups of query heads."""
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], dim=1)


@lru_cache(maxsize=1)
def _future(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


@dataclass(frozen=True)
class Eager:
    """Softmax written out, as the eager attention of transformers: the n x n weights exist."""

    def __call__(self, query, key, value):
        scores = torch.matmul(query, _per_query_head(query, key).transpose(2, 3)) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(_future(query.shape[2]), torch.finfo(scores.dtype).min)
        weights = weights.softmax(-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, _per_query_head(query, value))

    def step(self, query, key, value) -> Callable[[], Any]:
        new = query[:, :, -1:]

        def attend():
            scores = torch.matmul(new, _per_query_head(new, key).transpose(2, 3)) * new.shape[-1] ** -0.5
            weights = scores.softmax(-1, dtype=torch.float32).to(new.dtype)
            return torch.matmul(weights, _per_query_head(new, value))

        return attend

    @staticmethod
    def nbytes(num_heads: int, length: int) -> int:
        """Of its matrices at their most, forward and backward: about five of float32."""
        return 5 * 4 * num_heads * length**2


class FastTransformers:
    """Causal linear attention with elu + 1 of pytorch-fast-transformers: its own modules around its C++ product.

    It takes `[B, n, H, D]`; views of that order cost nothing, as its own transposition undoes them.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self):
        from fast_transformers.attention.causal_linear_attention import CausalLinearAttention
        from fast_transformers.masking import LengthMask, TriangularCausalMask
        from fast_transformers.recurrent.attention import RecurrentLinearAttention

        self.attention, self.recurrent = CausalLinearAttention(64), RecurrentLinearAttention(64)
        self.masks = cache(lambda batch, n: (TriangularCausalMask(n), LengthMask(torch.full((batch,), n))))

    def __call__(self, query, key, value):
        causal, lengths = self.masks(query.shape[0], query.shape[2])
        given = query, _per_query_head(query, key), _per_query_head(query, value)
        return self.attention(*(t.transpose(1, 2) for t in given), causal, lengths, lengths).transpose(1, 2)

    def step(self, query, key, value) -> Callable[[], Any]:
        """Its state is float32 of one size; that after one token takes as long as that after n."""
        query, *shared = (t[:, :, -1] for t in (query, key, value))
        state = None

        def attend():
            nonlocal state
            out, state = self.recurrent(query, *(_per_query_head(query, t) for t in shared), state=state)
            return out

        attend()
        return attend
