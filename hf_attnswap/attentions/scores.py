"""The family of variants that act on the scores: O(n^2), as softmax, whatever the activation."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import Mask
from ..ops.backends import Op, in_large_kernels
from ..ops.heads import compute_dtype, mix, scores
from ..ops.rows import Tile, by_rows, rows_per_tile
from ..ops.scores import WORTH_IT, blocked_scores
from .base import Attention, by_definition

_scores = Op("scores")


class ScoreAttention(Attention):
    """Variants that act on the scores s_ij: O(n^2 d) time, and O(n d) memory by tiles of rows.

    o_i = sum_j a_ij v_j / d_i. A variant of this family writes `activate` (the a_ij) and `denominator` (the d_i).

    Attributes:
        needs_peak: `activate` wants the largest score of each row.
        needs_total: `denominator` wants the sum of the a_ij.
    """

    cost = "O(n^2 d)"
    cost_class = "quadratic"
    any_mask = True
    ops = ("scores",)
    needs_peak: ClassVar[bool] = False
    needs_total: ClassVar[bool] = False

    def activate(self, scores: Tensor, count: Tensor, peak: Tensor | None, heads: slice) -> Tensor:
        """The a_ij, one by one from the scores times `score_factor`, which it may overwrite.

        Args:
            scores: `[..., h, t, s]`, -inf where the row may not attend to the key; the result must be 0 there.
            count: how many keys each row may attend to, at least 1; broadcastable to `[..., h, t, 1]`.
            peak: the largest score of each row, -inf where it may attend to nothing; None unless `needs_peak`.
            heads: which query heads these are.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no activate")

    def denominator(self, total: Tensor | None, count: Tensor) -> Tensor | None:
        """The d_i, `[B, H, T, 1]` or 1 in places, from the sum of the a_ij (None unless `needs_total`); None for 1."""
        return None

    def score_factor(self) -> float | Tensor:
        """A factor of all scores, a number or `[H, 1, 1]`: cheaper on the queries than in `activate`."""
        return 1.0

    def finish(self, out: Tensor) -> Tensor:
        """What is left to do with `sum_j w_ij v_j`, `[B, H, t, Dv]`."""
        return out

    def weights(self, query, key, mask, scaling):
        everything = Tile(slice(0, mask.query_length), slice(0, mask.key_length), mask.matrix(query.device))
        weights, denominator = self._parts(query, key, everything, mask, mask.bias, scaling)
        weights = weights if denominator is None else weights / denominator
        return weights if mask.sinks is None else weights[..., :-1]

    def reference(self, query, key, value, mask, scaling):
        return self.finish(super().reference(query, key, value, mask, scaling))

    def _parts(self, query, key, tile: Tile, mask: Mask, bias, scaling) -> tuple[Tensor, Tensor | None]:
        """The a_ij (with those of the sinks as last column) and the d_i of a tile."""
        factor = self.score_factor()
        if torch.is_tensor(factor):
            factor = factor.to(query.dtype)
        if bias is None and mask.softcap is None and mask.sinks is None:
            s = scores(query * (scaling * factor), key)
        else:
            s = scores(query * scaling, key)
            if mask.softcap is not None:
                s = mask.softcap * torch.tanh(s / mask.softcap)
            if bias is not None:
                s = s + bias
            s = s * factor
        s = forbid(s, tile)
        count = tile.count()
        if mask.sinks is not None:
            sinks = (mask.sinks.to(s.dtype)[:, None, None] * factor).expand(*s.shape[:-1], 1)
            s, count = torch.cat([s, sinks], dim=-1), count + 1
        peak = s.amax(-1, keepdim=True) if self.needs_peak else None
        weights = self.activate(s, count, peak, slice(None))
        total = weights.sum(-1, keepdim=True) if self.needs_total else None
        return weights, self.denominator(total, count.to(weights.dtype))

    def forward(self, query, key, value, mask, scaling, state=None):
        return _scores(self, query, key, value, mask, scaling)

    def _attend(self, query, key, value, bias, tile: Tile, mask: Mask, scaling: float) -> Tensor:
        """The rows of one tile."""
        dtype = compute_dtype(query.dtype)
        bias = None if bias is None else bias.to(dtype)
        weights, denominator = self._parts(query.to(dtype), key.to(dtype), tile, mask, bias, scaling)
        out = mix(weights if mask.sinks is None else weights[..., :-1], value.to(dtype))
        out = out if denominator is None else out / denominator
        return self.finish(out).to(query.dtype)

    def _by_tiles(self, query, key, value, mask: Mask, scaling: float) -> Tensor:
        def attend(query, key, value, bias, tile: Tile, carry):
            return (self._attend(query, key, value, bias, tile, mask, scaling),), carry

        size = rows_per_tile(query.shape[0], query.shape[1], key.shape[2])
        parameters = [*self.parameters(), *([] if mask.sinks is None else [mask.sinks])]
        (out,), _ = by_rows(attend, query, key, value, mask.tiles(size, query.device), parameters, mask.bias)
        return out

    def _one_row(self, query, key, value, mask: Mask, scaling: float) -> Tensor:
        tile = Tile(slice(None), slice(None), mask.matrix(query.device))
        return self._attend(query, key, value, mask.bias, tile, mask, scaling)

    def _fits_blocks(self, query, key, mask: Mask) -> bool:
        """Whether blocks of scores in a CPU's cache serve the call, and are worth it."""
        scores_per_head = query.shape[2] * key.shape[2] * query.shape[1] // key.shape[1]
        simple = mask.plain and mask.valid is None and not (torch.is_grad_enabled() and self.needs_peak)
        return simple and scores_per_head >= WORTH_IT and not in_large_kernels(query)

    def _blocked(self, query, key, value, mask: Mask, scaling: float) -> Tensor:
        dtype, group = compute_dtype(query.dtype), query.shape[1] // key.shape[1]

        def activate(kv_head: int, scores: Tensor, count: Tensor, peak: Tensor | None) -> Tensor:
            return self.activate(scores, count, peak, slice(kv_head * group, (kv_head + 1) * group))

        out, total = blocked_scores(
            query.to(dtype) * (scaling * self.score_factor()),
            key,
            value,
            activate,
            causal=mask.causal,
            needs_peak=self.needs_peak,
            needs_total=self.needs_total,
            parameters=tuple(self.parameters()),
        )
        rows = torch.arange(query.shape[2], device=query.device) + mask.offset + 1
        count = rows[:, None] if mask.causal else torch.full_like(rows, key.shape[2])[:, None]
        denominator = self.denominator(total, count.to(dtype))
        out = out if denominator is None else out / denominator
        return self.finish(out).to(query.dtype)


@_scores.form("torch")
def _scores_torch(attention: ScoreAttention, query, key, value, mask, scaling):
    if query.shape[2] == 1:
        form = attention._one_row
    else:
        form = attention._blocked if attention._fits_blocks(query, key, mask) else attention._by_tiles
    return form(query, key, value, mask, scaling)


_scores.form("reference")(by_definition)


def forbid(scores: Tensor, tile: Tile) -> Tensor:
    """-inf where the tile does not allow; in place where no gradient is wanted."""
    if torch.is_grad_enabled():
        allowed = F.pad(tile.allowed, (tile.free, 0), value=True) if tile.free else tile.allowed
        return scores.masked_fill(~allowed, float("-inf"))
    scores[..., tile.free :].masked_fill_(~tile.allowed, float("-inf"))
    return scores
