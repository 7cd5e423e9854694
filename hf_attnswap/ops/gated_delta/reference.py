"""Compute the recurrence of the gated delta rule as the formula says, token by token."""

import torch

from ..heads import compute_dtype, scores


def run(query, key, value, beta, log_gate, state, chunk):
    """Return what `causal_gated_delta` returns; differentiable by autograd, with one state per token.

    Takes the arguments of `causal_gated_delta` in order; `chunk` has no effect.
    """
    dtype = compute_dtype(query.dtype)
    q, k, v, b, gate = (t.to(dtype) for t in (query, key, value, beta, log_gate.exp()))
    S = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state.to(dtype)
    rows = [q.new_empty(*q.shape[:2], 0, v.shape[-1])]  # of an empty text
    for i in range(query.shape[2]):
        token, S = k[:, :, i, :, None], gate[:, :, i, None, None] * S
        S = S + token * (b[:, :, i, None, None] * (v[:, :, i, None, :] - token.mT @ S))
        rows.append(scores(q[:, :, i : i + 1], S.mT))
    return torch.cat(rows, dim=2).to(query.dtype), S.detach()
