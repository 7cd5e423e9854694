"""Compute the gated recurrence as the formula says, token by token."""

import torch
import torch.nn.functional as F

from ..heads import compute_dtype, scores
from ..states import divided


def run(query, key, value, log_gate, state, eps, chunk):
    """Return what `causal_gated` returns, token by token; differentiable by autograd, with one state per token.

    Takes the arguments of `causal_gated` in order; `chunk` has no effect.
    """
    dtype = compute_dtype(query.dtype)
    q, k, gate = query.to(dtype), key.to(dtype), log_gate.to(dtype).exp()
    v = F.pad(value.to(dtype), (0, 1), value=1.0)
    S = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state.to(dtype)
    rows = [q.new_empty(*q.shape[:2], 0, v.shape[-1])]  # of an empty text
    for i in range(query.shape[2]):
        S = gate[:, :, i, None, None] * S + k[:, :, i, :, None] * v[:, :, i, None, :]
        rows.append(scores(q[:, :, i : i + 1], S.mT))
    out, den = divided(torch.cat(rows, dim=2), eps)
    return out if eps is None else out.to(query.dtype), den, S.detach()
