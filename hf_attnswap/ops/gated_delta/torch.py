"""Compute the gated delta rule with torch alone, by chunks of tokens (Yang 2024).

A token adds `u_i k_i^T` with `u_i = beta_i (v_i - g_i S_{i-1} k_i)`. With S the state before the chunk, e_i what
remains of it at token i, and D_ij what remains at i of what token j added,

    (I + N) U = beta (V - e K S),   N = strictly lower part of beta (D * K K^T)

is one triangular solve, and what follows is gated linear attention with U in place of V. The state is kept transposed,
`[D, Dv]`. The backward pass computes each chunk again (`by_rows`).
"""

import torch
from torch import Tensor

from ..chunks import to_rows
from ..heads import compute_dtype
from ..programs import in_one_piece
from ..rows import Tile, by_rows
from ..states import decays
from .reference import run as by_formula


def run(query, key, value, beta, log_gate, state, chunk):
    """Return what `causal_gated_delta` returns: one token after a state by the recurrence, all else by chunks.

    The whole text is one chunk where the call has to go in one piece.

    Takes the arguments of `causal_gated_delta` in order. O(n d) memory, with a gradient too.
    """
    batch, kv_heads, length, dim = key.shape
    dtype = compute_dtype(query.dtype)
    rows, width = batch * kv_heads, value.shape[-1]
    if state is None:
        S = query.new_zeros(rows, dim, width, dtype=dtype)
    else:
        S = state.to(dtype).flatten(0, 1)
    if length == 1 and state is not None and not torch.is_grad_enabled():
        out, S = _step(query, key, value, beta, log_gate, S)
        return out.to(query.dtype), S.view_as(state)

    if not in_one_piece(query) and not length:
        return by_formula(query, key, value, beta, log_gate, state, chunk)

    def attend(query, key, value, bias, tile, S):
        """Return the output of one chunk, `[B, H, t, Dv]`, and the state after it."""
        q, k, v = (to_rows(t.to(dtype), rows) for t in (query, key, value))
        v, b, gate = v[..., :width], v[..., width:-1], v[..., -1]
        between, since = decays(gate)
        N = b * between * (k @ k.mT)
        U = torch.linalg.solve_triangular(N, b * (v - since * (k @ S)), upper=False, unitriangular=True)
        A = (q @ k.mT).unflatten(1, (-1, k.shape[1])) * between[:, None]
        seen = (q @ S).unflatten(1, (-1, k.shape[1])) * since[:, None]
        out = (A @ U[:, None] + seen).reshape(*query.shape[:3], width)
        return (out.to(query.dtype),), since[:, -1:] * S + (k * between[:, -1, :, None]).mT @ U

    size = length if in_one_piece(query) else chunk
    parts = (
        [slice(0, length)]
        if in_one_piece(query)
        else [slice(start, min(start + size, length)) for start in range(0, length, size)]
    )
    tokens = torch.cat([value.to(dtype), beta.to(dtype)[..., None], log_gate.to(dtype)[..., None]], dim=-1)
    (out,), S = by_rows(attend, query, key, tokens, [Tile(part, part, None) for part in parts], carry=S)
    return out, S.unflatten(0, (batch, kv_heads))


def _step(query, key, value, beta, log_gate, S: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and state for one token after a state: the recurrent form, in few kernels."""
    rows, dtype = S.shape[0], S.dtype
    q, k, v, b, gate = (to_rows(t.to(dtype), rows) for t in (query, key, value, beta[..., None], log_gate[..., None]))
    S = S * gate.exp()
    S = torch.baddbmm(S, k.mT, torch.baddbmm(v, k, S, alpha=-1).mul_(b))
    return torch.bmm(q, S).view(*query.shape[:2], 1, -1), S
