"""Compute `sum_j a(s_ij) v_j` and `sum_j a(s_ij)` on a CPU, by blocks of scores that stay in a core's cache.

The loops take one key/value head with its group of query heads at a time, then blocks of rows, then blocks of keys:
a block of scores is made by one product, activated in place and consumed by the next product. Where an activation
needs the largest score of its row, all scores of fewer rows are made first. The backward pass makes each block again
(as Dao 2022, "FlashAttention", does for softmax) and goes through its activation alone by autograd. O(n^2 d) time,
O(n d) memory.
"""

import torch
from torch import Tensor

from ..heads import cast_like, compute_dtype
from ..spec import Activation

# Rows and keys of a block; with a group of three query heads its scores take 0.8 MB.
ROWS, KEYS = 256, 256
# Scores of whole rows, where the largest must be known first.
WHOLE_ROWS = 1 << 19
# Below this many scores per key/value head, the loop costs more than the cache gains.
WORTH_IT = 1 << 18


def blocked_scores(
    query: Tensor, key: Tensor, value: Tensor, activation: Activation, *, causal: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the sums of weights times values, and of weights, over all keys or over those up to the row.

    Args:
        query: `[B, H, T, D]`, times the scaling and the activation's factor already; key: `[B, Hkv, S, D]`; value:
            `[B, Hkv, S, Dv]`. Causal queries are the last T of S.
        activation: where gradients are enabled, one that does not need the largest score of a row.
        causal: whether keys after the row are left out.

    Returns:
        `[B, H, T, Dv]` and, where the denominator needs it, `[B, H, T, 1]` (else None); both in `compute_dtype`.

    Raises:
        ValueError: gradients are enabled and the activation needs the largest score of a row.
    """
    if not torch.is_grad_enabled():
        return _sums(query, key, value, activation, causal)
    if activation.needs_peak:
        raise ValueError("blocked_scores has no gradient through the largest score of a row")
    return _Blocked.apply(query, key, value, activation, causal, *activation.tensors.values())


def _sums(query, key, value, activation, causal):
    """Return what `blocked_scores` returns, without a gradient."""
    needs_peak, needs_total = activation.needs_peak, activation.needs_total
    dtype = compute_dtype(query.dtype)
    batch, heads, length, dim = query.shape
    kv_heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    group, offset = heads // kv_heads, keys - length
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = query.new_empty(batch, length, heads, value_dim, dtype=dtype).transpose(1, 2)
    totals = query.new_empty(batch, heads, length, 1, dtype=dtype) if needs_total else None
    rows = max(16, min(ROWS, WHOLE_ROWS // (group * keys))) if needs_peak else ROWS
    block = max(KEYS, ROWS * KEYS // rows)
    # Added: masked_fill takes many times as long.
    future = query.new_full((rows, rows), float("-inf"), dtype=dtype).triu_(1)
    for b in range(batch):
        for h in range(kv_heads):
            of_group = slice(h * group, (h + 1) * group)
            k = key[b, h].to(dtype).t()
            v = value[b, h].to(dtype)
            for start in range(0, length, rows):
                stop = min(start + rows, length)
                size = stop - start
                seen = offset + stop if causal else keys
                diagonal = offset + start if causal else keys  # keys from here on are not seen by all rows
                count = _count(query, diagonal, size, seen, causal)
                q = query[b, of_group, start:stop].to(dtype).reshape(group * size, dim)
                whole = peak = None
                if needs_peak:
                    whole = _forbid(torch.mm(q, k[:, :seen]).view(group, size, seen), 0, diagonal, future)
                    peak = whole.amax(-1, keepdim=True)
                numerator = q.new_zeros(group * size, value_dim)
                total = q.new_zeros(group, size, 1) if needs_total else None
                for first in range(0, seen, block):
                    last = min(first + block, seen)
                    if whole is None:
                        s = torch.mm(q, k[:, first:last]).view(group, size, last - first)
                        s = _forbid(s, first, diagonal, future)
                    else:
                        s = whole[..., first:last]
                    weights = activation(s, count, peak, of_group)
                    numerator.addmm_(weights.reshape(group * size, last - first), v[first:last])
                    if needs_total:
                        total += weights.sum(-1, keepdim=True)
                out[b, of_group, start:stop] = numerator.view(group, size, value_dim)
                if needs_total:
                    totals[b, of_group, start:stop] = total
    return out, totals


class _Blocked(torch.autograd.Function):
    """Add a backward pass to `_sums`, block by block.

    With dn and dl the gradients of both sums, per block: da = dn v^T + dl, dv = a^T dn; autograd from a to q, k.
    """

    @staticmethod
    def forward(ctx, query, key, value, activation, causal, *tensors):
        ctx.save_for_backward(query, key, value, *tensors)
        ctx.activation, ctx.causal = activation, causal
        return _sums(query, key, value, activation, causal)

    @staticmethod
    def backward(ctx, grad_out, grad_total):
        query, key, value, *tensors = ctx.saved_tensors
        wanted = [t for t in tensors if t.requires_grad]
        grad_wanted = [torch.zeros_like(p, dtype=compute_dtype(p.dtype)) for p in wanted]
        dtype = compute_dtype(query.dtype)
        _, heads, length, dim = query.shape
        keys, group = key.shape[2], heads // key.shape[1]
        offset = keys - length
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(t, dtype=dtype) for t in (key, value))
        future = query.new_full((ROWS, ROWS), float("-inf"), dtype=dtype).triu_(1)
        for b in range(key.shape[0]):
            for h in range(key.shape[1]):
                of_group = slice(h * group, (h + 1) * group)
                k, v = key[b, h].to(dtype), value[b, h].to(dtype)
                for start in range(0, length, ROWS):
                    stop = min(start + ROWS, length)
                    size = stop - start
                    seen = offset + stop if ctx.causal else keys
                    diagonal = offset + start if ctx.causal else keys
                    count = _count(query, diagonal, size, seen, ctx.causal)
                    q = query[b, of_group, start:stop].to(dtype).reshape(group * size, dim)
                    dn = grad_out[b, of_group, start:stop].reshape(group * size, -1)
                    dq = torch.zeros_like(q)
                    for first in range(0, seen, KEYS):
                        part = slice(first, min(first + KEYS, seen))
                        with torch.enable_grad():
                            ends = q.detach().requires_grad_(), k[part].detach().requires_grad_()
                            s = torch.mm(ends[0], ends[1].t()).view(group, size, -1)
                            weights = ctx.activation(_forbid(s, first, diagonal, future), count, None, of_group)
                        da = torch.mm(dn, v[part].t()).view_as(weights)
                        if grad_total is not None:
                            da += grad_total[b, of_group, start:stop]
                        grads = torch.autograd.grad(weights, [*ends, *wanted], da, allow_unused=True)
                        dq += grads[0]
                        grad_key[b, h, part] += grads[1]
                        grad_value[b, h, part].addmm_(weights.detach().reshape(group * size, -1).t(), dn)
                        for total, grad in zip(grad_wanted, grads[2:], strict=True):
                            if grad is not None:
                                total += grad
                    grad_query[b, of_group, start:stop] = dq.view(group, size, dim)
        by_tensor = iter(cast_like(grad_wanted, wanted))
        grads = grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)
        return *grads, None, None, *(next(by_tensor) if t.requires_grad else None for t in tensors)


def _count(like: Tensor, diagonal: int, size: int, seen: int, causal: bool) -> Tensor:
    """Return how many keys each of `size` rows may attend to, `[size, 1]`; the first row sees keys 0 to `diagonal`."""
    dtype = compute_dtype(like.dtype)
    if not causal:
        return like.new_full((size, 1), seen, dtype=dtype)
    return torch.arange(diagonal + 1, seen + 1, dtype=dtype, device=like.device)[:, None]


def _forbid(scores: Tensor, first: int, diagonal: int, future: Tensor) -> Tensor:
    """Return the scores with -inf at the keys after the row, set in place.

    Args:
        scores: `[G, size, keys]`, whose columns begin at key `first`.
        diagonal: the key at the place of the first row.
        future: -inf above the diagonal, 0 elsewhere, at least `[size, size]`.
    """
    size, last = scores.shape[1], first + scores.shape[2]
    if last > diagonal:
        start = max(first, diagonal)
        scores[..., start - first :].add_(future[:size, start - diagonal : last - diagonal])
    return scores
