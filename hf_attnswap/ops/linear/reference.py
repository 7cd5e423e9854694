"""Compute the formula over whole matrices: O(n^2) time and memory, the features of every token at once.

In float64 where the inputs are.
"""

import torch.nn.functional as F

from ..heads import compute_dtype
from ..states import divided, tokens_that_count
from ._features import mapped, scaled


def run(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, causal, log_decay):
    """Return what `causal_linear` returns, or what `full_linear` returns and None for the state if not `causal`.

    Takes the arguments of `causal_linear` in order, with `causal` before the last; `chunk` has no effect.
    """
    dtype, group = compute_dtype(query.dtype), query.shape[1] // key.shape[1]
    q = mapped(scaled(query, dtype, scale), map_query)
    k = mapped(scaled(key, dtype, scale), map_key, key_mask).repeat_interleave(group, dim=1)
    v = F.pad(value.to(dtype), (0, 1), value=1.0).repeat_interleave(group, dim=1)
    if not causal:
        return *divided(q @ k.mT @ v, eps), None
    weights = (q @ k.mT).tril()
    if log_decay is not None:
        # n_i tokens count up to token i: key j has faded n_i - n_j times.
        counted = tokens_that_count(key_mask, query.shape[2], query.device).to(dtype)[:, None, :, None]
        n, all_of_them = counted.cumsum(2), counted.sum(2, keepdim=True)
        log_decay = log_decay.to(dtype).repeat_interleave(group)[:, None, None]
        weights = weights * (log_decay * (n - n.mT).tril()).exp()
        q, k = q * (log_decay * n).exp(), k * (log_decay * (all_of_them - n)).exp()
    mixed = weights @ v
    added = (k.mT @ v)[:, ::group]
    if state is not None:
        mixed = mixed + q @ state.to(dtype).repeat_interleave(group, dim=1)
        added = added + (state if log_decay is None else state * (log_decay * all_of_them).exp()[:, ::group])
    out, den = divided(mixed, eps)
    return out if eps is None else out.to(query.dtype), den, added.detach()
