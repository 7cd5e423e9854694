"""Compute linear attention with torch alone, on any device.

One token after a state is the recurrence. Long texts go by blocks in a CPU's cache (`_blocks.py`) or, elsewhere,
where torch.compile traces the code and inside torch.func's transforms, by all chunks at once in a handful of large
kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import BLOCK, from_chunks, in_large_kernels, to_chunks, to_rows
from ..heads import compute_dtype
from ..programs import in_one_piece, sizes_are_open, whole_chunks
from ..states import divided, faded, fading, linear_block, linear_block_at_once, linear_step, tokens_that_count
from ._blocks import by_blocks, by_blocks_with_gradient
from ._features import empty_result, mapped, scaled, write_result
from .reference import run as by_formula


def run(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, causal, log_decay):
    """Return what `causal_linear` returns, or what `full_linear` returns and None for the state if not `causal`.

    Takes the arguments of `causal_linear` in order, with `causal` before the last; picks the fastest function of this
    file.
    """
    if not causal:
        return full(query, key, value, map_query, map_key, scale, key_mask, eps)
    if query.shape[2] == 1 and state is not None and not torch.is_grad_enabled():
        form = one_token
    elif in_large_kernels(query) or in_one_piece(query):
        form = at_once
    elif not query.shape[2]:
        return by_formula(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, causal, log_decay)
    else:
        form = by_blocks_with_gradient if torch.is_grad_enabled() else by_blocks
    return form(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, log_decay)


def one_token(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, log_decay):
    """Return what `causal_linear` returns for one token after a state, without a gradient; O(F Dv) time per head."""
    dtype = compute_dtype(query.dtype)
    q = mapped(scaled(query, dtype, scale), map_query)
    k = mapped(scaled(key, dtype, scale), map_key, key_mask)
    kept = None
    if log_decay is not None:
        kept = fading(log_decay.to(dtype), tokens_that_count(key_mask, 1, query.device), 1)[0]
    mixed, S = linear_step(q, k, value, state.to(dtype), kept)
    out, den = divided(mixed, eps)
    return out if eps is None else out.to(query.dtype), den, S


def at_once(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, log_decay):
    """Return what `causal_linear` returns, all chunks together: no loop, differentiable by autograd.

    O(n F) memory, and one state per chunk.
    """
    batch, heads, length, _ = query.shape
    kv_heads, dtype = value.shape[1], compute_dtype(query.dtype)
    q = mapped(scaled(query, dtype, scale), map_query)
    k = mapped(scaled(key, dtype, scale), map_key, key_mask)
    v = F.pad(value.to(dtype), (0, 1), value=1.0)
    chunks = whole_chunks(length, chunk) if sizes_are_open(query) else -(-length // chunk)
    more, kept = chunks * chunk - length, None
    # Tokens without features behind the last one leave no trace.
    q, k, v = (F.pad(t, (0, 0, 0, more)) for t in (q, k, v))
    if log_decay is not None:
        counted = tokens_that_count(key_mask, length, query.device, more)
        q, k, kept = faded(q, k, *fading(log_decay.to(dtype), counted, chunk))
    q, k, v = (to_chunks(t, kv_heads, chunk) for t in (q, k, v))
    first = k.new_zeros(k.shape[1], k.shape[-1], v.shape[-1]) if state is None else state.to(dtype).flatten(0, 1)
    attend = linear_block_at_once if kept is None else linear_block
    mixed, after = attend(q, k, v, first, kept)
    out, den = divided(from_chunks(mixed, batch, chunk)[:, :, :length], eps)
    return out if eps is None else out.to(query.dtype), den, after.detach().unflatten(0, (batch, kv_heads))


def full(query, key, value, map_query, map_key, scale, key_mask, eps):
    """Return what `full_linear` returns, and None: one sum over the keys, then one product per block of queries."""
    # With a gradient, autograd keeps all features anyway.
    whole = in_large_kernels(query) or torch.is_grad_enabled() or in_one_piece(query, key)
    rows, dtype = value.shape[0] * value.shape[1], compute_dtype(query.dtype)
    S = None
    for part in _parts(key.shape[2], whole):
        k = to_rows(mapped(scaled(key[:, :, part], dtype, scale), map_key, key_mask, part), rows)
        v = F.pad(value[:, :, part].to(dtype), (0, 1), value=1.0).flatten(0, 1)
        S = torch.bmm(k.mT, v) if S is None else S.baddbmm_(k.mT, v)

    def of_rows(part: slice) -> tuple[Tensor, Tensor]:
        """Return numerator `[B, H, t, Dv]` and denominator `[B, H, t, 1]` of the rows `part`."""
        q = mapped(scaled(query[:, :, part], dtype, scale), map_query)
        mixed = torch.bmm(to_rows(q, rows), S).view(*q.shape[:3], -1)
        return mixed[..., :-1], mixed[..., -1:]

    if whole or query.shape[2] <= BLOCK:
        numerator, denominator = of_rows(slice(None))
        return numerator if eps is None else numerator / (denominator + eps), denominator.squeeze(-1), None
    out, den = empty_result(query, value, dtype)
    for part in _parts(query.shape[2], whole):
        write_result(*of_rows(part), out[:, :, part], den[:, :, part], eps)
    return out, den, None


def _parts(length: int, whole: bool) -> list[slice]:
    """Return all tokens as one slice where they go as a whole, else in blocks."""
    return [slice(None)] if whole else [slice(start, start + BLOCK) for start in range(0, length, BLOCK)]
