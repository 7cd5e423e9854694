"""Linear attention: `sum_j (phi(q_i) . phi(k_j)) v_j` in O(n d d') time and O(n d) memory, causal or not.

The causal form goes by chunks of `chunk` tokens: inside a chunk the masked product, across chunks the state
`S = sum_j phi(k_j) [v_j, 1]^T` (Katharopoulos 2020; the chunked form is that of Hua 2022, "FLASH"). The column of
ones behind the values makes the denominator `sum_j phi(q_i) . phi(k_j)` one more column of every product. States,
denominators and products are float32 whatever the input dtype (float64 for float64 inputs): a bfloat16 state drifts
over long texts.

The feature maps are applied chunk by chunk, so that no `n x d'` tensor is written; the backward pass maps again.
Kept for the backward pass: query, key, value, the result, and the state at the start of every chunk.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .heads import cast_like, compute_dtype

FeatureMap = Callable[[Tensor], Tensor]


def causal_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    map_query: FeatureMap,
    map_key: FeatureMap,
    *,
    scale: float = 1.0,
    parameters: Sequence[Tensor] = (),
    key_mask: Tensor | None = None,
    state: Tensor | None = None,
    eps: float | None = 1e-6,
    chunk: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal linear attention over `[B, H, T, D]`; query heads share key/value heads in groups.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, T, D]`; value: `[B, Hkv, T, Dv]`.
        map_query, map_key: `[B, heads, t, D]` -> `[B, heads, t, F]`, applied to float32 slices of the sequence.
        scale: factor of query and key before the maps.
        parameters: every tensor the maps use that needs a gradient.
        key_mask: bool `[B, T]`; keys at False leave no trace.
        state: of the tokens before, `[B, Hkv, F, Dv + 1]` (a constant to the gradient); None at the start of a text.
        eps: added to the denominator; None returns the numerator undivided.
        chunk: tokens per chunk.

    Returns:
        `[B, H, T, Dv]` in the query's dtype (float32 where `eps` is None), the denominator `sum_j phi(q_i) . phi(k_j)`
        as float32 `[B, H, T]`, and the state after the last token.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    arguments = (query, key, value, key_mask, state, map_query, map_key, scale, eps, chunk)
    if torch.is_grad_enabled():
        return _CausalLinear.apply(*arguments, *parameters)
    if query.shape[2] == 1 and state is not None:
        return _step(*arguments[:-1])
    return _forward(*arguments, keep_states=False)[:3]


def full_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    map_query: FeatureMap,
    map_key: FeatureMap,
    *,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    eps: float | None = 1e-6,
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """Linear attention of every query to every key, `sum_j (phi(q_i) . phi(k_j)) v_j`: two products, O(n d d') time.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`.
        key_mask: bool `[B, S]`; keys at False leave no trace.
        map_query, map_key, scale, eps: as in `causal_linear`.
        chunk: tokens that are mapped at a time.

    Returns:
        `[B, H, T, Dv]` and the denominator `[B, H, T]`, both in `compute_dtype`.
    """
    batch, heads, length, _ = query.shape
    rows, dtype = batch * value.shape[1], compute_dtype(query.dtype)
    S = 0
    for start in range(0, key.shape[2], chunk):
        part = slice(start, start + chunk)
        mask = None if key_mask is None else key_mask[:, part]
        k = _rows(_mapped(_scaled(key[:, :, part], dtype, scale), map_key, mask), rows)
        v = F.pad(value[:, :, part].to(dtype), (0, 1), value=1.0).flatten(0, 1)
        S = S + torch.bmm(k.transpose(1, 2), v)
    outs, denominators = [], []
    for start in range(0, length, chunk):
        q = _mapped(_scaled(query[:, :, start : start + chunk], dtype, scale), map_query)
        mixed = torch.bmm(_rows(q, rows), S).view(batch, heads, q.shape[2], -1)
        numerator, denominator = mixed[..., :-1], mixed[..., -1]
        outs.append(numerator if eps is None else numerator / (denominator[..., None] + eps))
        denominators.append(denominator)
    return torch.cat(outs, dim=2), torch.cat(denominators, dim=2)


def _step(query, key, value, key_mask, state, map_query, map_key, scale, eps):
    """One token after a state: the recurrent form, in few kernels."""
    batch, heads, _, _ = query.shape
    rows, dtype = batch * value.shape[1], compute_dtype(query.dtype)
    q = _rows(_mapped(_scaled(query, dtype, scale), map_query), rows)
    k = _rows(_mapped(_scaled(key, dtype, scale), map_key, key_mask), rows)
    v = F.pad(value.to(dtype), (0, 1), value=1.0).flatten(0, 1)
    S = torch.baddbmm(state.to(dtype).flatten(0, 1), k.transpose(1, 2), v)
    mixed = torch.bmm(q, S).view(batch, heads, 1, -1)
    numerator, denominator = mixed[..., :-1], mixed[..., -1:]
    out = numerator if eps is None else (numerator / (denominator + eps)).to(query.dtype)
    return out, denominator.squeeze(-1), S.view_as(state)


def _scaled(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    x = x.to(dtype)
    return x if scale == 1 else x * scale


def _mapped(x: Tensor, feature_map: FeatureMap, key_mask: Tensor | None = None) -> Tensor:
    """Features of one chunk; zero where a key is switched off."""
    features = feature_map(x)
    return features if key_mask is None else features * key_mask[:, None, :, None].to(features.dtype)


def _rows(features: Tensor, batch: int) -> Tensor:
    """`[B, H, t, F]` -> `[B Hkv, G t, F]`: the query heads of a group below each other, as one matrix."""
    return features.reshape(batch, -1, features.shape[-1])


def _tril_(stacked: Tensor, length: int) -> Tensor:
    """Zero, in place, what lies in the future in `[B Hkv, G t, t]`."""
    stacked.view(len(stacked), -1, length, length).tril_()
    return stacked


def _forward(query, key, value, key_mask, state, map_query, map_key, scale, eps, chunk, *parameters, keep_states):
    batch, heads, length, _ = query.shape
    kv_heads, value_dim = value.shape[1], value.shape[-1]
    rows, dtype = batch * kv_heads, compute_dtype(query.dtype)
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out_dtype = dtype if eps is None else query.dtype
    out = query.new_empty(batch, length, heads, value_dim, dtype=out_dtype).transpose(1, 2)
    den = query.new_empty(batch, heads, length, dtype=dtype)
    ones = value.new_ones(rows, min(chunk, length), value_dim + 1, dtype=dtype)
    S = None if state is None else state.to(dtype, copy=True).flatten(0, 1)
    states = None
    for index, start in enumerate(range(0, length, chunk)):
        part = slice(start, min(start + chunk, length))
        size = part.stop - start
        mask = None if key_mask is None else key_mask[:, part]
        q = _rows(_mapped(_scaled(query[:, :, part], dtype, scale), map_query), rows)
        k = _rows(_mapped(_scaled(key[:, :, part], dtype, scale), map_key, mask), rows)
        v = ones[:, :size]
        v[..., :-1] = value[:, :, part].reshape(rows, size, value_dim)
        if S is None:
            S = q.new_zeros(rows, q.shape[-1], value_dim + 1)
        if keep_states:
            if states is None:
                states = S.new_empty(-(-length // chunk), *S.shape)
            states[index] = S
        mixed = torch.bmm(_tril_(torch.bmm(q, k.transpose(1, 2)), size), v).baddbmm_(q, S)
        mixed = mixed.view(batch, heads, size, value_dim + 1)
        numerator, denominator = mixed[..., :-1], mixed[..., -1:]
        den[:, :, part] = denominator.squeeze(-1)
        out[:, :, part] = numerator if eps is None else numerator / (denominator + eps)
        S.baddbmm_(k.transpose(1, 2), v)
    return out, den, S.unflatten(0, (batch, kv_heads)), states


class _CausalLinear(torch.autograd.Function):
    """With v and dn the values and the numerator's gradient, both with the denominator's column, per chunk:

    P        = tril(dn v^T),  A = tril(phi(q) phi(k)^T)
    dphi(q)  = P phi(k) + dn S^T              (S: state before the chunk)
    dphi(k)  = P^T phi(q) + v R^T             (R = sum of phi(q)^T dn over later chunks)
    dv       = A^T dn + phi(k) R
    """

    @staticmethod
    def forward(ctx, query, key, value, key_mask, state, map_query, map_key, scale, eps, chunk, *parameters):
        out, den, S, states = _forward(
            query, key, value, key_mask, state, map_query, map_key, scale, eps, chunk, keep_states=True
        )
        ctx.save_for_backward(query, key, value, key_mask, out, den, states, *parameters)
        ctx.maps, ctx.scale, ctx.eps, ctx.chunk = (map_query, map_key), scale, eps, chunk
        ctx.mark_non_differentiable(S)
        return out, den, S

    @staticmethod
    def backward(ctx, grad_out, grad_den, _grad_state):
        query, key, value, key_mask, out, den, states, *parameters = ctx.saved_tensors
        batch, heads, length, _ = query.shape
        kv_heads, value_dim = value.shape[1], value.shape[-1]
        rows, dtype, scale = batch * kv_heads, compute_dtype(query.dtype), ctx.scale
        grad_query, grad_key, grad_value = (torch.empty_like(t) for t in (query, key, value))
        grad_parameters = [torch.zeros_like(p, dtype=compute_dtype(p.dtype)) for p in parameters]
        ones = value.new_ones(rows, min(ctx.chunk, length), value_dim + 1, dtype=dtype)
        grads = value.new_empty(batch, heads, min(ctx.chunk, length), value_dim + 1, dtype=dtype)
        R = torch.zeros_like(states[0])
        for index, start in reversed(list(enumerate(range(0, length, ctx.chunk)))):
            part = slice(start, min(start + ctx.chunk, length))
            size = part.stop - start
            with torch.enable_grad():
                query_leaf = _scaled(query[:, :, part].detach(), dtype, scale).requires_grad_()
                key_leaf = _scaled(key[:, :, part].detach(), dtype, scale).requires_grad_()
                mapped_query = _mapped(query_leaf, ctx.maps[0])
                mapped_key = _mapped(key_leaf, ctx.maps[1], None if key_mask is None else key_mask[:, part])
            q, k = _rows(mapped_query.detach(), rows), _rows(mapped_key.detach(), rows)
            v = ones[:, :size]
            v[..., :-1] = value[:, :, part].reshape(rows, size, value_dim)
            dn = _numerator_grad(grads[:, :, :size], grad_out[:, :, part], grad_den[:, :, part], out[:, :, part],
                                 den[:, :, part], ctx.eps)  # fmt: skip
            dn = _rows(dn, rows)
            P = _tril_(torch.bmm(dn, v.transpose(1, 2)), size)
            A = _tril_(torch.bmm(q, k.transpose(1, 2)), size)
            dq = torch.bmm(P, k).baddbmm_(dn, states[index].transpose(1, 2))
            dk = torch.bmm(P.transpose(1, 2), q).baddbmm_(v, R.transpose(1, 2))
            dv = torch.bmm(A.transpose(1, 2), dn).baddbmm_(k, R)
            R.baddbmm_(q.transpose(1, 2), dn)
            grad_value[:, :, part] = dv[..., :-1].view(batch, kv_heads, size, value_dim)
            for leaf, mapped, grad, target in (
                (query_leaf, mapped_query, dq, grad_query), (key_leaf, mapped_key, dk, grad_key)
            ):  # fmt: skip
                leaf_grad = _map_backward(leaf, mapped, grad.view_as(mapped), parameters, grad_parameters)
                torch.mul(leaf_grad, scale, out=leaf_grad)
                target[:, :, part] = leaf_grad
        return grad_query, grad_key, grad_value, *[None] * 7, *cast_like(grad_parameters, parameters)


def _numerator_grad(buffer, grad_out, grad_den, out, den, eps):
    """Fill `buffer` `[B, H, t, Dv + 1]` with the gradients of numerator and denominator, and return it."""
    if eps is None:
        buffer[..., :-1] = grad_out
        buffer[..., -1] = grad_den
    else:
        reciprocal = (den + eps).reciprocal()
        torch.mul(grad_out, reciprocal[..., None], out=buffer[..., :-1])
        torch.sub(grad_den, (buffer[..., :-1] * out).sum(-1), out=buffer[..., -1])
    return buffer


def _map_backward(leaf, mapped, grad, parameters, grad_parameters):
    """Through one feature map, for one chunk; parameter gradients add up over the chunks."""
    wanted = [i for i, p in enumerate(parameters) if p.requires_grad]
    grads = torch.autograd.grad(mapped, [leaf, *(parameters[i] for i in wanted)], grad, allow_unused=True)
    for i, grad_parameter in zip(wanted, grads[1:], strict=True):
        if grad_parameter is not None:
            grad_parameters[i] += grad_parameter
    return grads[0]
