"""Causal linear attention: `sum_{j <= i} (phi(q_i) . phi(k_j)) v_j` in O(n d d') time and O(n d) memory.

Chunks of `chunk` tokens: inside a chunk the masked product, across chunks the state
`S = sum_j phi(k_j) v_j^T` and `z = sum_j phi(k_j)` (Katharopoulos 2020; the chunked form is that of Hua 2022, "FLASH").
State, denominators and products are float32 whatever the input dtype (float64 for float64 inputs): a bfloat16
state drifts over long texts.

The feature maps are applied chunk by chunk, so that no `n x d'` tensor is written; the backward pass maps again.
Kept for the backward pass: query, key, value, the result, and the state at the start of every chunk.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .heads import compute_dtype, stack_groups, unstack_groups

FeatureMap = Callable[[Tensor], Tensor]


class LinearState(NamedTuple):
    """What a linear layer remembers of all earlier tokens: S `[B, Hkv, F, Dv]` and z `[B, Hkv, F]`, float32."""

    S: Tensor
    z: Tensor


def causal_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    map_query: FeatureMap,
    map_key: FeatureMap,
    *,
    parameters: Sequence[Tensor] = (),
    key_mask: Tensor | None = None,
    state: LinearState | None = None,
    eps: float | None = 1e-6,
    chunk: int = 64,
) -> tuple[Tensor, Tensor, LinearState]:
    """Causal linear attention over `[B, H, T, D]`; query heads share key/value heads in groups.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, T, D]`; value: `[B, Hkv, T, Dv]`.
        map_query, map_key: `[B, heads, t, D]` -> `[B, heads, t, F]`, applied to float32 slices of the sequence.
        parameters: every tensor the maps use that needs a gradient.
        key_mask: bool `[B, T]`; keys at False leave no trace.
        state: of the tokens before (constants to the gradient); None at the start of a text.
        eps: added to the denominator; None returns numerator and denominator undivided.
        chunk: tokens per chunk.

    Returns:
        `[B, H, T, Dv]` in the query's dtype (float32 numerator where `eps` is None), the denominator
        `phi(q_i) . z_i` as float32 `[B, H, T]`, and the state after the last token.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if torch.is_grad_enabled():
        out, den, S, z = _CausalLinear.apply(
            query, key, value, key_mask, state, map_query, map_key, eps, chunk, *parameters
        )
    else:
        out, den, S, z, _ = _forward(query, key, value, key_mask, state, map_query, map_key, eps, chunk, False)
    return out, den, LinearState(S, z)


def _masked(features: Tensor, key_mask: Tensor | None, start: int, stop: int) -> Tensor:
    if key_mask is None:
        return features
    return features * key_mask[:, None, start:stop, None].to(features.dtype)


def _tril_(stacked: Tensor, length: int) -> Tensor:
    """Zero, in place, what lies in the future in `[B, Hkv, G * t, t]`."""
    stacked.view(*stacked.shape[:2], -1, length, length).tril_()
    return stacked


def _forward(query, key, value, key_mask, state, map_query, map_key, eps, chunk, keep_states):
    batch, heads, length, _ = query.shape
    kv_heads, value_dim = value.shape[1], value.shape[-1]
    dtype = compute_dtype(query.dtype)
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = query.new_empty(batch, length, heads, value_dim, dtype=dtype if eps is None else query.dtype).transpose(1, 2)
    den = query.new_empty(batch, heads, length, dtype=dtype)
    S, z = (None, None) if state is None else (state.S.to(dtype), state.z.to(dtype).unsqueeze(-1))
    states = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        q = stack_groups(map_query(query[:, :, start:stop].to(dtype)), kv_heads)
        k = _masked(map_key(key[:, :, start:stop].to(dtype)), key_mask, start, stop)
        v = value[:, :, start:stop].to(dtype)
        if S is None:
            S, z = q.new_zeros(batch, kv_heads, q.shape[-1], value_dim), q.new_zeros(batch, kv_heads, q.shape[-1], 1)
        if keep_states:
            states.append((S, z))
        weights = _tril_(q @ k.transpose(-1, -2), stop - start)
        numerator = unstack_groups(weights @ v + q @ S, heads)
        denominator = unstack_groups(weights.sum(-1, keepdim=True) + q @ z, heads)
        den[:, :, start:stop] = denominator.squeeze(-1)
        out[:, :, start:stop] = numerator if eps is None else numerator / (denominator + eps)
        S = S + k.transpose(-1, -2) @ v
        z = z + k.sum(-2).unsqueeze(-1)
    return out, den, S, z.squeeze(-1), states


class _CausalLinear(torch.autograd.Function):
    """With `dn` and `dd` the gradients of numerator and denominator, and `P = tril(dn v^T + dd 1^T)` per chunk:

    dphi(q) = dn S^T + dd z^T + P phi(k)         (S, z: state before the chunk)
    dphi(k) = v R^T + r^T + P^T phi(q)           (R = sum phi(q)^T dn, r = sum phi(q)^T dd over later chunks)
    dv      = phi(k) R + tril(phi(q) phi(k)^T)^T dn
    """

    @staticmethod
    def forward(ctx, query, key, value, key_mask, state, map_query, map_key, eps, chunk, *parameters):
        out, den, S, z, states = _forward(
            query, key, value, key_mask, state, map_query, map_key, eps, chunk, keep_states=True
        )
        ctx.save_for_backward(query, key, value, key_mask, out, den, *parameters)
        ctx.states, ctx.maps, ctx.eps, ctx.chunk = states, (map_query, map_key), eps, chunk
        ctx.mark_non_differentiable(S, z)
        return out, den, S, z

    @staticmethod
    def backward(ctx, grad_out, grad_den, _grad_S, _grad_z):
        query, key, value, key_mask, out, den, *parameters = ctx.saved_tensors
        map_query, map_key = ctx.maps
        heads, kv_heads = query.shape[1], key.shape[1]
        dtype = compute_dtype(query.dtype)
        grad_query, grad_key, grad_value = (torch.empty_like(t) for t in (query, key, value))
        grad_parameters = [torch.zeros_like(p) for p in parameters]
        R = r = None
        starts = range(0, query.shape[2], ctx.chunk)
        for index in reversed(range(len(starts))):
            start = starts[index]
            stop = min(start + ctx.chunk, query.shape[2])
            rows = slice(start, stop)
            S, z = ctx.states[index]
            with torch.enable_grad():
                query_leaf = query[:, :, rows].detach().to(dtype).requires_grad_()
                key_leaf = key[:, :, rows].detach().to(dtype).requires_grad_()
                mapped_query = map_query(query_leaf)
                mapped_key = _masked(map_key(key_leaf), key_mask, start, stop)
            q, k = stack_groups(mapped_query.detach(), kv_heads), mapped_key.detach()
            v = value[:, :, rows].to(dtype)
            dn, dd = grad_out[:, :, rows].to(dtype), grad_den[:, :, rows, None]
            if ctx.eps is not None:
                reciprocal = (den[:, :, rows, None] + ctx.eps).reciprocal()
                dn = dn * reciprocal
                dd = dd - (dn * out[:, :, rows].to(dtype)).sum(-1, keepdim=True)
            dn, dd = stack_groups(dn, kv_heads), stack_groups(dd, kv_heads)
            P = _tril_(dn @ v.transpose(-1, -2) + dd, stop - start)
            weights = _tril_(q @ k.transpose(-1, -2), stop - start)
            dq = dn @ S.transpose(-1, -2) + dd * z.transpose(-1, -2) + P @ k
            dk = P.transpose(-1, -2) @ q
            dv = weights.transpose(-1, -2) @ dn
            if R is not None:
                dk += v @ R.transpose(-1, -2) + r.transpose(-1, -2)
                dv += k @ R
            grad_value[:, :, rows] = dv
            _map_backward(
                query_leaf, mapped_query, unstack_groups(dq, heads), parameters, grad_query[:, :, rows], grad_parameters
            )
            _map_backward(key_leaf, mapped_key, dk, parameters, grad_key[:, :, rows], grad_parameters)
            dR, dr = q.transpose(-1, -2) @ dn, q.transpose(-1, -2) @ dd
            R, r = (dR, dr) if R is None else (R + dR, r + dr)
        return grad_query, grad_key, grad_value, None, None, None, None, None, None, *grad_parameters


def _map_backward(leaf, mapped, grad, parameters, grad_leaf, grad_parameters):
    """Through one feature map, for one chunk; parameter gradients add up over the chunks."""
    wanted = [i for i, p in enumerate(parameters) if p.requires_grad]
    grads = torch.autograd.grad(mapped, [leaf, *(parameters[i] for i in wanted)], grad, allow_unused=True)
    grad_leaf.copy_(grads[0])
    for i, grad_parameter in zip(wanted, grads[1:], strict=True):
        if grad_parameter is not None:
            grad_parameters[i] += grad_parameter
