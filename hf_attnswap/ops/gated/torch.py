"""Compute gated linear attention with torch alone, by chunks of tokens (Yang 2024, GLA).

Inside a chunk stands the masked product with every term times the gates between its key and its query; the state
carries what lies before the chunk.

The logs of the gates are summed over exactly the tokens between the two, never as a difference of two long sums: no
exponent is positive, gates of 0 do no harm, and a gate near 0 costs its neighbours no digits. The backward pass keeps
the inputs, the output, and the state at the start of every chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import from_chunks, to_chunks, to_rows
from ..heads import compute_dtype
from ..programs import in_one_piece, sizes_are_open, whole_chunks
from ..states import decays, divided, numerator_grad
from .reference import run as by_formula


def run(query, key, value, log_gate, state, eps, chunk):
    """Return what `causal_gated` returns: one token after a state by the recurrence, all else by chunks.

    Chunks follow each other, or go together where the call has to go in one piece.

    Takes the arguments of `causal_gated` in order. O(n d) memory, with a gradient too.
    """
    arguments = (query, key, value, log_gate, state, eps, chunk)
    if query.shape[2] == 1 and state is not None and not torch.is_grad_enabled():
        return _step(*arguments[:-1])
    if in_one_piece(query):
        return _at_once(*arguments)
    if not query.shape[2]:
        return by_formula(*arguments)
    if torch.is_grad_enabled():
        return _CausalGated.apply(*arguments)
    return _forward(*arguments, keep_states=False)[:3]


def _step(query, key, value, log_gate, state, eps):
    """Return output, denominator and state for one token after a state: the recurrent form, in few kernels."""
    batch, heads, _, _ = query.shape
    rows, dtype = batch * value.shape[1], compute_dtype(query.dtype)
    q, k = to_rows(query.to(dtype), rows), to_rows(key.to(dtype), rows)
    v = F.pad(value.to(dtype), (0, 1), value=1.0).flatten(0, 1)
    kept = (state.to(dtype) * log_gate.to(dtype).exp()[..., None]).flatten(0, 1)
    S = torch.baddbmm(kept, k.transpose(1, 2), v)
    mixed = torch.bmm(q, S).view(batch, heads, 1, -1)
    numerator, denominator = mixed[..., :-1], mixed[..., -1:]
    out = numerator if eps is None else (numerator / (denominator + eps)).to(query.dtype)
    return out, denominator.squeeze(-1), S.view_as(state)


def _at_once(query, key, value, log_gate, state, eps, chunk):
    """Return what `causal_gated` returns, all chunks together: no loop, differentiable by autograd.

    The states before the chunks are sums over the chunks before, by the gates of whole chunks: O((n / chunk)^2 F Dv)
    more time than `_forward`.
    """
    batch, heads, length, _ = query.shape
    kv_heads, dtype = value.shape[1], compute_dtype(query.dtype)
    chunks = whole_chunks(length, chunk) if sizes_are_open(query) else -(-length // chunk)
    # Tokens with key 0 and log_gate 0 behind the last one leave the state as it is.
    more = chunks * chunk - length
    v = F.pad(value.to(dtype), (0, 1), value=1.0)
    q, k, v = (to_chunks(F.pad(t.to(dtype), (0, 0, 0, more)), kv_heads, chunk) for t in (query, key, v))
    gates = to_chunks(F.pad(log_gate.to(dtype), (0, more))[..., None], kv_heads, chunk)[..., 0]
    between, since = (t.unflatten(0, (chunks, -1)) for t in decays(gates.flatten(0, 1)))
    of_chunks, since_start = decays(gates.sum(-1).T)
    S = k.new_zeros(k.shape[1], k.shape[-1], v.shape[-1]) if state is None else state.to(dtype).flatten(0, 1)
    added = (k * between[:, :, -1, :, None]).mT @ v
    sums = torch.einsum("rij,jrfe->irfe", of_chunks, added) + since_start.transpose(0, 1)[..., None] * S
    before = torch.cat([S[None], sums])[:-1]
    A = (q @ k.mT).unflatten(2, (-1, chunk)) * between[:, :, None]
    mixed = (q @ before).unflatten(2, (-1, chunk)) * since[:, :, None]
    mixed = from_chunks(A.flatten(2, 3) @ v + mixed.flatten(2, 3), batch, chunk)[:, :, :length]
    out, den = divided(mixed, eps)
    return out if eps is None else out.to(query.dtype), den, sums[-1].detach().unflatten(0, (batch, kv_heads))


def _per_group(stacked: Tensor, length: int) -> Tensor:
    """Return `[B Hkv, G t, F]` as a view `[B Hkv, G, t, F]`, for t = `length`."""
    return stacked.view(len(stacked), -1, length, stacked.shape[-1])


def _forward(query, key, value, log_gate, state, eps, chunk, *, keep_states):
    """Return output, denominator, last state, and the state before every chunk (None unless `keep_states`)."""
    batch, heads, length, features = query.shape
    kv_heads, value_dim = value.shape[1], value.shape[-1]
    rows, dtype = batch * kv_heads, compute_dtype(query.dtype)
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out_dtype = dtype if eps is None else query.dtype
    out = query.new_empty(batch, length, heads, value_dim, dtype=out_dtype).transpose(1, 2)
    den = query.new_empty(batch, heads, length, dtype=dtype)
    ones = value.new_ones(rows, min(chunk, length), value_dim + 1, dtype=dtype)
    if state is None:
        S = query.new_zeros(rows, features, value_dim + 1, dtype=dtype)
    else:
        S = state.to(dtype, copy=True).flatten(0, 1)
    states = S.new_empty(-(-length // chunk), *S.shape) if keep_states else None
    for index, start in enumerate(range(0, length, chunk)):
        part = slice(start, min(start + chunk, length))
        size = part.stop - start
        q, k = (to_rows(t[:, :, part].to(dtype), rows) for t in (query, key))
        v = ones[:, :size]
        v[..., :-1] = value[:, :, part].reshape(rows, size, value_dim)
        between, since = decays(log_gate[:, :, part].to(dtype).reshape(rows, size))
        if keep_states:
            states[index] = S
        A = torch.bmm(q, k.transpose(1, 2))
        _per_group(A, size).mul_(between[:, None])
        mixed = torch.bmm(q, S)
        _per_group(mixed, size).mul_(since[:, None])
        mixed = mixed.baddbmm_(A, v).view(batch, heads, size, value_dim + 1)
        numerator, denominator = mixed[..., :-1], mixed[..., -1:]
        den[:, :, part] = denominator.squeeze(-1)
        out[:, :, part] = numerator if eps is None else numerator / (denominator + eps)
        S.mul_(since[:, -1:]).baddbmm_((k * between[:, -1, :, None]).transpose(1, 2), v)
    return out, den, S.unflatten(0, (batch, kv_heads)), states


class _CausalGated(torch.autograd.Function):
    """Run `_forward` with a backward pass by chunks, from the last to the first.

    With v and dn the values and the numerator's gradient, both with the denominator's column, per chunk:

    D, e     = decays between two tokens of the chunk, and since its start
    P        = D * (dn v^T),  A = D * (q k^T),  E = P * (q k^T)
    dq       = P k + e dn S^T                  (S: state before the chunk)
    dk       = P^T q + D_last v R^T            (R: gradient of the state after the chunk)
    dv       = A^T dn + D_last k R
    dlog g_l = what passes through gate l: the sums over i >= l > s of E_is, of q_i . (e dn S^T)_i,
               of v_s . (D_last k R)_s, and e_last <S, R>
    """

    @staticmethod
    def forward(ctx, query, key, value, log_gate, state, eps, chunk):
        out, den, S, states = _forward(query, key, value, log_gate, state, eps, chunk, keep_states=True)
        ctx.save_for_backward(query, key, value, log_gate, out, den, states)
        ctx.eps, ctx.chunk = eps, chunk
        ctx.mark_non_differentiable(S)
        return out, den, S

    @staticmethod
    def backward(ctx, grad_out, grad_den, _grad_state):
        query, key, value, log_gate, out, den, states = ctx.saved_tensors
        batch, heads, length, _ = query.shape
        kv_heads, value_dim = value.shape[1], value.shape[-1]
        rows, dtype = batch * kv_heads, compute_dtype(query.dtype)
        grad_query, grad_key, grad_value, grad_gate = (torch.empty_like(t) for t in (query, key, value, log_gate))
        ones = value.new_ones(rows, min(ctx.chunk, length), value_dim + 1, dtype=dtype)
        R = torch.zeros_like(states[0])
        for index, start in reversed(list(enumerate(range(0, length, ctx.chunk)))):
            part = slice(start, min(start + ctx.chunk, length))
            size = part.stop - start
            q, k = (to_rows(t[:, :, part].to(dtype), rows) for t in (query, key))
            v = ones[:, :size]
            v[..., :-1] = value[:, :, part].reshape(rows, size, value_dim)
            dn = numerator_grad(grad_out[:, :, part], grad_den[:, :, part], out[:, :, part], den[:, :, part], ctx.eps)
            dn = to_rows(dn, rows)
            between, since = decays(log_gate[:, :, part].to(dtype).reshape(rows, size))
            S, last = states[index], between[:, -1, :, None]
            P, A = torch.bmm(dn, v.transpose(1, 2)), torch.bmm(q, k.transpose(1, 2))
            _per_group(P, size).mul_(between[:, None])
            E = _per_group(P * A, size).sum(1)
            _per_group(A, size).mul_(between[:, None])
            dn_since = (_per_group(dn, size) * since[:, None]).view_as(dn)
            dq_state = torch.bmm(dn_since, S.transpose(1, 2))
            dv_state = torch.bmm(k, R).mul_(last)
            dq = torch.baddbmm(dq_state, P, k)
            dk = torch.bmm(v, R.transpose(1, 2)).mul_(last).baddbmm_(P.transpose(1, 2), q)
            dv = torch.baddbmm(dv_state, A.transpose(1, 2), dn)
            grad_query[:, :, part] = dq.view(batch, heads, size, -1)
            grad_key[:, :, part] = dk.view(batch, kv_heads, size, -1)
            grad_value[:, :, part] = dv[..., :-1].view(batch, kv_heads, size, value_dim)
            from_state = _per_group(q * dq_state, size).sum((1, 3))
            to_state = (v * dv_state).sum(-1)
            through = (S * R).sum((1, 2))[:, None] * since[:, -1]
            dgate = _from_on(E).tril_(-1).sum(-1) + _from_on(from_state) + (to_state.cumsum(1) - to_state) + through
            grad_gate[:, :, part] = dgate.view(batch, kv_heads, size)
            R = torch.baddbmm(R * since[:, -1:], q.transpose(1, 2), dn_since)
        return grad_query, grad_key, grad_value, grad_gate, None, None, None


def _from_on(x: Tensor) -> Tensor:
    """Return the sums over this token of the chunk and all later ones, along dimension 1."""
    return x.flip(1).cumsum(1).flip(1)
