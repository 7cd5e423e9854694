"""Compute the delta rule with torch alone, by chunks of tokens (Yang 2024).

A token adds `u_i k_i^T` with `u_i = beta_i (v_i - S_{i-1} k_i)`; inside a chunk

    (I + N) U = beta (V - K S),   N = strictly lower part of beta (K K^T)      (S: state before the chunk)

is one triangular solve, and what follows is linear attention with U in place of V. The state is kept transposed,
`[D, Dv]`. The backward pass keeps the inputs and the state at the start of every chunk.
"""

import torch

from ..chunks import to_rows, tril_
from ..heads import compute_dtype
from ..programs import in_one_piece
from .reference import run as by_formula


def run(query, key, value, beta, state, chunk):
    """Return what `causal_delta` returns: one token after a state by the recurrence, all else by chunks.

    The whole text is one chunk where the call has to go in one piece.

    Takes the arguments of `causal_delta` in order. O(n d) memory, with a gradient too.
    """
    if query.shape[2] == 1 and state is not None and not torch.is_grad_enabled():
        return _step(query, key, value, beta, state)
    if in_one_piece(query):
        return _at_once(query, key, value, beta, state)
    if not query.shape[2]:
        return by_formula(query, key, value, beta, state, chunk)
    if torch.is_grad_enabled():
        return _CausalDelta.apply(query, key, value, beta, state, chunk)
    return _forward(query, key, value, beta, state, chunk, keep_states=False)[:2]


def _step(query, key, value, beta, state):
    """Return output and state for one token after a state: the recurrent form, in few kernels."""
    batch, heads, _, _ = query.shape
    rows, dtype = batch * value.shape[1], compute_dtype(query.dtype)
    q, k, v, b = (to_rows(t.to(dtype), rows) for t in (query, key, value, beta[..., None]))
    S = state.to(dtype).flatten(0, 1)
    u = torch.baddbmm(v, k, S, alpha=-1).mul_(b)
    S = torch.baddbmm(S, k.transpose(1, 2), u)
    return torch.bmm(q, S).view(batch, heads, 1, -1).to(query.dtype), S.view_as(state)


def _at_once(query, key, value, beta, state):
    """Return what `causal_delta` returns, the whole text as one chunk: O(n^2) memory, differentiable by autograd."""
    batch, heads, length, dim = query.shape
    kv_heads, dtype = value.shape[1], compute_dtype(query.dtype)
    q, k, v, b = _chunk(query, key, value, beta, slice(None), dtype)
    S = k.new_zeros(k.shape[0], dim, v.shape[-1]) if state is None else state.to(dtype).flatten(0, 1)
    U = _additions(k, v, b, S)[0]
    A = torch.bmm(q, k.mT).unflatten(1, (-1, length)).tril().flatten(1, 2)
    mixed = (torch.bmm(A, U) + torch.bmm(q, S)).view(batch, heads, length, -1)
    S = torch.baddbmm(S, k.mT, U).detach()
    return mixed.to(query.dtype), S.unflatten(0, (batch, kv_heads))


def _chunk(query, key, value, beta, part, dtype):
    """Return queries `[B Hkv, G t, D]`, keys and values `[B Hkv, t, *]` and beta `[B Hkv, t, 1]` of one chunk."""
    rows = value.shape[0] * value.shape[1]
    return (to_rows(t[:, :, part].to(dtype), rows) for t in (query, key, value, beta[..., None]))


def _additions(k, v, b, S):
    """Return U, and what it is made of: `V - K S`, `K K^T`, and `beta (K K^T)`.

    Only the part below the diagonal of the last one means anything.
    """
    error = torch.baddbmm(v, k, S, alpha=-1)
    overlap = torch.bmm(k, k.transpose(1, 2))
    N = b * overlap
    U = torch.linalg.solve_triangular(N, b * error, upper=False, unitriangular=True)
    return U, error, overlap, N


def _forward(query, key, value, beta, state, chunk, *, keep_states):
    """Return output, last state, and the state before every chunk (None unless `keep_states`)."""
    batch, heads, length, dim = query.shape
    kv_heads, value_dim = value.shape[1], value.shape[-1]
    dtype = compute_dtype(query.dtype)
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = query.new_empty(batch, length, heads, value_dim).transpose(1, 2)
    if state is None:
        S = query.new_zeros(batch * kv_heads, dim, value_dim, dtype=dtype)
    else:
        S = state.to(dtype, copy=True).flatten(0, 1)
    states = S.new_empty(-(-length // chunk), *S.shape) if keep_states else None
    for index, start in enumerate(range(0, length, chunk)):
        part = slice(start, min(start + chunk, length))
        size = part.stop - start
        q, k, v, b = _chunk(query, key, value, beta, part, dtype)
        if keep_states:
            states[index] = S
        U = _additions(k, v, b, S)[0]
        mixed = torch.bmm(tril_(torch.bmm(q, k.transpose(1, 2)), size), U).baddbmm_(q, S)
        out[:, :, part] = mixed.view(batch, heads, size, value_dim)
        S.baddbmm_(k.transpose(1, 2), U)
    return out, S.unflatten(0, (batch, kv_heads)), states


class _CausalDelta(torch.autograd.Function):
    """Run `_forward` with a backward pass by chunks, from the last to the first.

    With do the gradient of the output, S the state before the chunk, R the gradient of the state after the chunk:

    P     = tril(do U^T),  A = tril(q k^T)
    dU    = A^T do + k R
    dX    = (I + N)^-T dU            (X = beta (V - K S))
    M     = beta tril(-dX U^T, -1)   (beta times the gradient of N)
    dq    = P k + do S^T
    dk    = P^T q + U R^T - beta dX S^T + (M + M^T) k
    dv    = beta dX
    dbeta = dX . (V - K S) - dX U^T . K K^T below the diagonal, summed over each row
    dS    = R + q^T do - k^T beta dX
    """

    @staticmethod
    def forward(ctx, query, key, value, beta, state, chunk):
        out, S, states = _forward(query, key, value, beta, state, chunk, keep_states=True)
        ctx.save_for_backward(query, key, value, beta, states)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(S)
        return out, S

    @staticmethod
    def backward(ctx, grad_out, _grad_state):
        query, key, value, beta, states = ctx.saved_tensors
        batch, heads, length, _ = query.shape
        kv_heads = value.shape[1]
        rows, dtype = batch * kv_heads, compute_dtype(query.dtype)
        grad_query, grad_key, grad_value, grad_beta = (torch.empty_like(t) for t in (query, key, value, beta))
        R = torch.zeros_like(states[0])
        for index, start in reversed(list(enumerate(range(0, length, ctx.chunk)))):
            part = slice(start, min(start + ctx.chunk, length))
            size = part.stop - start
            q, k, v, b = _chunk(query, key, value, beta, part, dtype)
            S = states[index]
            U, error, overlap, N = _additions(k, v, b, S)
            do = to_rows(grad_out[:, :, part].to(dtype), rows)
            P = tril_(torch.bmm(do, U.transpose(1, 2)), size)
            A = tril_(torch.bmm(q, k.transpose(1, 2)), size)
            dU = torch.bmm(A.transpose(1, 2), do).baddbmm_(k, R)
            dX = torch.linalg.solve_triangular(N.transpose(1, 2), dU, upper=True, unitriangular=True)
            dv = b * dX
            dN = torch.bmm(dX, U.transpose(1, 2)).neg_().tril_(-1)
            dbeta = (dX * error).sum(-1) + (dN * overlap).sum(-1)
            M = b * dN
            dq = torch.bmm(P, k).baddbmm_(do, S.transpose(1, 2))
            dk = torch.bmm(P.transpose(1, 2), q).baddbmm_(U, R.transpose(1, 2))
            dk.baddbmm_(dv, S.transpose(1, 2), alpha=-1).baddbmm_(M + M.transpose(1, 2), k)
            R = torch.baddbmm(R, q.transpose(1, 2), do).baddbmm_(k.transpose(1, 2), dv, alpha=-1)
            grad_query[:, :, part] = dq.view(batch, heads, size, -1)
            for target, grad in ((grad_key, dk), (grad_value, dv), (grad_beta[..., None], dbeta[..., None])):
                target[:, :, part] = grad.view(batch, kv_heads, size, -1)
        return grad_query, grad_key, grad_value, grad_beta, None, None
