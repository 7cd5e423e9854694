"""`o_i = sum_j a(s_ij) v_j / d_i` without gradients on a CPU: blocks of scores that stay in a core's cache.

One key/value head with its group of query heads at a time, rows by rows and keys by keys: a block of scores is made by
one product, activated in place and consumed by the next product. A column of ones behind the values gives the sum of
the weights with the same product. Where an activation needs the largest score of its row, all scores of fewer rows are
made first. O(n^2 d) time, O(n d) memory.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .heads import compute_dtype

# Rows and keys of a block; with a group of three query heads its scores take 0.8 MB.
ROWS, KEYS = 256, 256
# Scores of whole rows, where the largest must be known first.
WHOLE_ROWS = 1 << 19
# Below this many scores per key/value head, the loop costs more than the cache gains.
WORTH_IT = 1 << 18

Activate = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def blocked_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    activate: Callable[[int, Tensor, Tensor, Tensor | None], Tensor],
    *,
    causal: bool,
    needs_peak: bool,
    needs_total: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums over all keys, or all up to the row.

    Args:
        query: `[B, H, T, D]`, scaled; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`. Causal queries are the last T.
        activate: `(key/value head, scores [G, t, s], count [t, 1], peak [G, t, 1] or None) -> [G, t, s]`; may overwrite
            the scores, which are -inf where a row may not attend.
        needs_peak: give `activate` the largest score of each row. needs_total: return the sums of the weights.

    Returns:
        `[B, H, T, Dv]` and, where `needs_total`, `[B, H, T, 1]`; both in `compute_dtype`.
    """
    dtype = compute_dtype(query.dtype)
    batch, heads, length, dim = query.shape
    kv_heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    group, offset = heads // kv_heads, keys - length
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = query.new_empty(batch, length, heads, value_dim, dtype=dtype).transpose(1, 2)
    totals = query.new_empty(batch, heads, length, 1, dtype=dtype) if needs_total else None
    rows = max(16, min(ROWS, WHOLE_ROWS // (group * keys))) if needs_peak else ROWS
    block = max(KEYS, ROWS * KEYS // rows)
    future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu_(1)
    for b in range(batch):
        for h in range(kv_heads):
            of_group = slice(h * group, (h + 1) * group)
            k = key[b, h].to(dtype).t()
            v = value[b, h].to(dtype)
            v = F.pad(v, (0, 1), value=1.0) if needs_total else v
            for start in range(0, length, rows):
                stop = min(start + rows, length)
                size = stop - start
                seen = offset + stop if causal else keys
                diagonal = offset + start if causal else keys  # keys from here on are not seen by all rows
                count = query.new_full((size, 1), keys, dtype=dtype)
                if causal:
                    count = torch.arange(diagonal + 1, seen + 1, dtype=dtype, device=query.device)[:, None]
                q = query[b, of_group, start:stop].to(dtype).reshape(group * size, dim)
                whole = peak = None
                if needs_peak:
                    whole = _forbid(torch.mm(q, k[:, :seen]).view(group, size, seen), 0, diagonal, future)
                    peak = whole.amax(-1, keepdim=True)
                numerator = q.new_zeros(group * size, v.shape[1])
                for first in range(0, seen, block):
                    last = min(first + block, seen)
                    if whole is None:
                        s = torch.mm(q, k[:, first:last]).view(group, size, last - first)
                        s = _forbid(s, first, diagonal, future)
                    else:
                        s = whole[..., first:last]
                    weights = activate(h, s, count, peak)
                    numerator.addmm_(weights.reshape(group * size, last - first), v[first:last])
                numerator = numerator.view(group, size, -1)
                out[b, of_group, start:stop] = numerator[..., :value_dim]
                if needs_total:
                    totals[b, of_group, start:stop] = numerator[..., value_dim:]
    return out, totals


def _forbid(scores: Tensor, first: int, diagonal: int, future: Tensor) -> Tensor:
    """-inf at the keys after the row, in place; the columns of `scores` begin at key `first`."""
    size, last = scores.shape[1], first + scores.shape[2]
    if last > diagonal:
        start = max(first, diagonal)
        scores[..., start - first :].masked_fill_(future[:size, start - diagonal : last - diagonal], float("-inf"))
    return scores
