"""Linear attention: `sum_j (phi(q_i) . phi(k_j)) v_j` in O(n d d') time and O(n d) memory, causal or not.

The causal form goes by chunks of `chunk` tokens: inside a chunk the masked product, across chunks the state
`S = sum_j phi(k_j) [v_j, 1]^T` (Katharopoulos 2020; the chunked form is that of Hua 2022, "FLASH"). The column of
ones behind the values makes the denominator `sum_j phi(q_i) . phi(k_j)` one more column of every product. States,
denominators and products are float32 whatever the input dtype (float64 for float64 inputs): a bfloat16 state drifts
over long texts.

Two implementations of one formula. On a CPU, blocks of a few chunks in turn: features are made block by block, while
they fit in a core's cache, so that no `n x d'` tensor is written; kept for the backward pass are query, key, value,
the result, and the state at the start of every block, and the features are made again. Elsewhere, and where
torch.compile looks at the code, all chunks at once in a handful of large kernels.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Op, in_large_kernels
from .chunks import BLOCK, blocks, by_heads, from_chunks, product, to_chunks, to_rows, tril_
from .heads import cast_like, compute_dtype

FeatureMap = Callable[[Tensor], Tensor]

_causal = Op("causal_linear")
_full = Op("full_linear")


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
    return _causal(query, key, value, key_mask, state, map_query, map_key, scale, eps, chunk, *parameters)


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
) -> tuple[Tensor, Tensor]:
    """Linear attention of every query to every key, `sum_j (phi(q_i) . phi(k_j)) v_j`: two products, O(n d d') time.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`.
        key_mask: bool `[B, S]`; keys at False leave no trace.
        map_query, map_key, scale, eps: as in `causal_linear`.

    Returns:
        `[B, H, T, Dv]` and the denominator `[B, H, T]`, both in `compute_dtype`.
    """
    return _full(query, key, value, map_query, map_key, scale, key_mask, eps)


@_full.form("torch")
def _full_torch(query, key, value, map_query, map_key, scale, key_mask, eps):
    # With a gradient, autograd keeps all features anyway.
    block = max(query.shape[2], key.shape[2], 1) if in_large_kernels(query) or torch.is_grad_enabled() else BLOCK
    rows, dtype = value.shape[0] * value.shape[1], compute_dtype(query.dtype)
    S = None
    for start in range(0, key.shape[2], block):
        part = slice(start, start + block)
        k = to_rows(_mapped(_scaled(key[:, :, part], dtype, scale), map_key, key_mask, part), rows)
        v = F.pad(value[:, :, part].to(dtype), (0, 1), value=1.0).flatten(0, 1)
        S = torch.bmm(k.mT, v) if S is None else S.baddbmm_(k.mT, v)

    def of_rows(part: slice) -> tuple[Tensor, Tensor]:
        q = _mapped(_scaled(query[:, :, part], dtype, scale), map_query)
        mixed = torch.bmm(to_rows(q, rows), S).view(*q.shape[:3], -1)
        return mixed[..., :-1], mixed[..., -1:]

    if block >= query.shape[2]:
        numerator, denominator = of_rows(slice(None))
        return numerator if eps is None else numerator / (denominator + eps), denominator.squeeze(-1)
    out, den = _empty_result(query, value, dtype)
    for start in range(0, query.shape[2], block):
        part = slice(start, start + block)
        _write(*of_rows(part), out[:, :, part], den[:, :, part], eps)
    return out, den


@_full.form("reference")
def _full_reference(query, key, value, map_query, map_key, scale, key_mask, eps):
    dtype, group = compute_dtype(query.dtype), query.shape[1] // key.shape[1]
    q, k, v = _explicit(query, key, value, map_query, map_key, scale, key_mask, dtype, group)
    return _divided(q @ k.mT @ v, eps)


@_causal.form("reference")
def _causal_reference(query, key, value, key_mask, state, map_query, map_key, scale, eps, chunk, *parameters):
    dtype, group = compute_dtype(query.dtype), query.shape[1] // key.shape[1]
    q, k, v = _explicit(query, key, value, map_query, map_key, scale, key_mask, dtype, group)
    mixed = (q @ k.mT).tril() @ v
    added = (k.mT @ v)[:, ::group]
    if state is not None:
        mixed = mixed + q @ state.to(dtype).repeat_interleave(group, dim=1)
        added = added + state
    out, den = _divided(mixed, eps)
    return out if eps is None else out.to(query.dtype), den, added.detach()


def _explicit(query, key, value, map_query, map_key, scale, key_mask, dtype, group):
    """Features of queries and keys, and the values with their column of ones, one of each per query head."""
    q = _mapped(_scaled(query, dtype, scale), map_query)
    k = _mapped(_scaled(key, dtype, scale), map_key, key_mask)
    v = F.pad(value.to(dtype), (0, 1), value=1.0)
    return q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


def _divided(mixed: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    numerator, denominator = mixed[..., :-1], mixed[..., -1:]
    return numerator if eps is None else numerator / (denominator + eps), denominator.squeeze(-1)


@_causal.form("torch")
def _causal_torch(query, key, value, key_mask, state, *rest):
    if query.shape[2] == 1 and state is not None and not torch.is_grad_enabled():
        return _step(query, key, value, key_mask, state, *rest)
    if in_large_kernels(query):
        return _at_once(query, key, value, key_mask, state, *rest)
    if torch.is_grad_enabled():
        return _CausalLinear.apply(query, key, value, key_mask, state, *rest)
    return _by_blocks(query, key, value, key_mask, state, *rest)[:3]


def _step(query, key, value, key_mask, state, map_query, map_key, scale, eps, chunk, *parameters):
    dtype = compute_dtype(query.dtype)
    q = _mapped(_scaled(query, dtype, scale), map_query)
    k = _mapped(_scaled(key, dtype, scale), map_key, key_mask)
    mixed, S = linear_step(q, k, value, state.to(dtype))
    out, den = _divided(mixed, eps)
    return out if eps is None else out.to(query.dtype), den, S


def linear_step(q: Tensor, k: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token after a state, over features: the recurrent form, in few kernels.

    Args:
        q: `[B, H, 1, F]`; k: `[B, Hkv, 1, F]`; value: `[B, Hkv, 1, Dv]`; state: `[B, Hkv, F, Dv + 1]`.

    Returns:
        Numerator and denominator `[B, H, 1, Dv + 1]`, and the state with the token.
    """
    batch, heads, _, width = q.shape
    state = torch.addcmul(state, k.mT, F.pad(value.to(state.dtype), (0, 1), value=1.0))
    mixed = torch.matmul(q.reshape(batch, value.shape[1], -1, width), state)
    return mixed.view(batch, heads, 1, -1), state


def linear_block(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A few chunks after a state, over features, causal.

    Args:
        q: `[c, B Hkv, G t, F]`; k: `[c, B Hkv, t, F]`; v: `[c, B Hkv, t, Dv + 1]` with a last column of ones.
        state: `[B Hkv, F, Dv + 1]`.

    Returns:
        Numerator and denominator `[c, B Hkv, G t, Dv + 1]`, and the state with the chunks.
    """
    before, state = _sums(state, k, v)
    inside = product(tril_(product(q, k.mT), k.shape[2]), v)
    return product(q, before, add_to=inside), state


def _at_once(query, key, value, key_mask, state, map_query, map_key, scale, eps, chunk, *parameters):
    """All chunks together: O(n d') memory, no loop, differentiable as it stands."""
    batch, heads, length, _ = query.shape
    kv_heads, dtype = value.shape[1], compute_dtype(query.dtype)
    q = _mapped(_scaled(query, dtype, scale), map_query)
    k = _mapped(_scaled(key, dtype, scale), map_key, key_mask)
    v = F.pad(value.to(dtype), (0, 1), value=1.0)
    # Tokens without features behind the last one leave no trace.
    q, k, v = (to_chunks(F.pad(t, (0, 0, 0, -length % chunk)), kv_heads, chunk) for t in (q, k, v))
    first = (
        k.new_zeros(1, *k.shape[1:2], k.shape[-1], v.shape[-1])
        if state is None
        else state.to(dtype).flatten(0, 1)[None]
    )
    sums = torch.cat([first, k.mT @ v]).cumsum(0)
    A = (q @ k.mT).unflatten(2, (-1, chunk)).tril().flatten(2, 3)
    mixed = from_chunks(A @ v + q @ sums[:-1], batch, chunk)[:, :, :length]
    out, den = _divided(mixed, eps)
    return out if eps is None else out.to(query.dtype), den, sums[-1].detach().unflatten(0, (batch, kv_heads))


def _scaled(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    x = x.to(dtype)
    return x if scale == 1 else x * scale


def _mapped(x: Tensor, feature_map: FeatureMap, key_mask: Tensor | None = None, part: slice = slice(None)) -> Tensor:
    """Features of some tokens; zero where a key is switched off."""
    features = feature_map(x)
    return features if key_mask is None else features * key_mask[:, None, part, None].to(features.dtype)


def _sums(first: Tensor, x: Tensor, y: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """`first + x_1^T y_1 + x_2^T y_2 ...` over `[c, R, *, *]`: what there is before each chunk, and after all.

    With `backwards` the sum begins at the last chunk.
    """
    before, order = [], range(len(x))
    for i in reversed(order) if backwards else order:
        before.append(first)
        first = torch.baddbmm(first, x[i].mT, y[i])
    return torch.stack(before[::-1] if backwards else before), first


def values_with_ones(value: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """`[B, Hkv, c t, Dv]` -> `[c, B Hkv, t, Dv + 1]`."""
    batch, kv_heads, length, width = value.shape
    with_ones = value.new_ones(length // chunk, batch * kv_heads, chunk, width + 1, dtype=dtype)
    by_chunk = value.unflatten(2, (-1, chunk)).permute(2, 0, 1, 3, 4)
    with_ones.unflatten(1, (batch, kv_heads))[..., :-1] = by_chunk
    return with_ones


def _empty_result(query: Tensor, value: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = query.new_empty(batch, length, heads, value.shape[-1], dtype=out_dtype).transpose(1, 2)
    return out, query.new_empty(batch, heads, length, dtype=compute_dtype(query.dtype))


def _write(numerator: Tensor, denominator: Tensor, out: Tensor, den: Tensor, eps: float | None) -> None:
    """The result and the denominator `[..., t, 1]` of some tokens to their place."""
    den.copy_(denominator.squeeze(-1))
    if eps is None:
        out.copy_(numerator)
    else:
        torch.div(numerator, denominator + eps, out=out)


def _by_blocks(
    query, key, value, key_mask, state, map_query, map_key, scale, eps, chunk, *parameters, keep_states=False
):
    batch, heads, length, _ = query.shape
    kv_heads, dtype = value.shape[1], compute_dtype(query.dtype)
    out, den = _empty_result(query, value, dtype if eps is None else query.dtype)
    S = None if state is None else state.to(dtype).flatten(0, 1)
    states = []
    for part in blocks(length, chunk):
        size = min(chunk, part.stop - part.start)
        q = to_chunks(_mapped(_scaled(query[:, :, part], dtype, scale), map_query), kv_heads, size)
        k = to_chunks(_mapped(_scaled(key[:, :, part], dtype, scale), map_key, key_mask, part), kv_heads, size)
        v = values_with_ones(value[:, :, part], size, dtype)
        if S is None:
            S = q.new_zeros(batch * kv_heads, q.shape[-1], v.shape[-1])
        if keep_states:
            states.append(S)
        mixed, S = linear_block(q, k, v, S)
        mixed = by_heads(mixed, batch, size)
        shape = mixed.shape[:-1]
        _write(mixed[..., :-1], mixed[..., -1:], out[:, :, part].view(*shape, -1), den[:, :, part].view(shape), eps)
    return out, den, S.unflatten(0, (batch, kv_heads)), states


class _CausalLinear(torch.autograd.Function):
    """With v and dn the values and the numerator's gradient, both with the denominator's column, per chunk:

    P        = tril(dn v^T),  A = tril(phi(q) phi(k)^T)
    dphi(q)  = P phi(k) + dn S^T              (S: state before the chunk)
    dphi(k)  = P^T phi(q) + v R^T             (R = sum of phi(q)^T dn over later chunks)
    dv       = A^T dn + phi(k) R
    """

    @staticmethod
    def forward(ctx, *arguments):
        query, key, value, key_mask, _, *ctx.maps, ctx.scale, ctx.eps, ctx.chunk = arguments[:10]
        out, den, S, states = _by_blocks(*arguments, keep_states=True)
        ctx.save_for_backward(query, key, value, key_mask, out, den, torch.stack(states), *arguments[10:])
        ctx.mark_non_differentiable(S)
        return out, den, S

    @staticmethod
    def backward(ctx, grad_out, grad_den, _grad_state):
        query, key, value, key_mask, out, den, states, *parameters = ctx.saved_tensors
        batch, _, length, _ = query.shape
        kv_heads, dtype, scale = value.shape[1], compute_dtype(query.dtype), ctx.scale
        grad_query, grad_key, grad_value = (torch.empty_like(t) for t in (query, key, value))
        grad_parameters = [torch.zeros_like(p, dtype=compute_dtype(p.dtype)) for p in parameters]
        wanted = [i for i, p in enumerate(parameters) if p.requires_grad]
        R = torch.zeros_like(states[0])
        for S, part in reversed(list(zip(states, blocks(length, ctx.chunk), strict=True))):
            size = min(ctx.chunk, part.stop - part.start)
            with torch.enable_grad():
                leaves = [_scaled(t[:, :, part].detach(), dtype, scale).requires_grad_() for t in (query, key)]
                mapped = [_mapped(leaves[0], ctx.maps[0]), _mapped(leaves[1], ctx.maps[1], key_mask, part)]
            q, k = (to_chunks(t.detach(), kv_heads, size) for t in mapped)
            v = values_with_ones(value[:, :, part], size, dtype)
            dn = _numerator_grad(grad_out[:, :, part], grad_den[:, :, part], out[:, :, part], den[:, :, part], ctx.eps)
            dn = to_chunks(dn, kv_heads, size)
            S, _ = _sums(S, k, v)
            Rs, R = _sums(R, q, dn, backwards=True)
            P = tril_(product(dn, v.mT), size)
            A = tril_(product(q, k.mT), size)
            dq = product(dn, S.mT, add_to=product(P, k))
            dk = product(v, Rs.mT, add_to=product(P.mT, q))
            dv = product(k, Rs, add_to=product(A.mT, dn))
            grad_value[:, :, part] = from_chunks(dv, batch, size)[..., :-1]
            grads = torch.autograd.grad(
                mapped,
                [*leaves, *(parameters[i] for i in wanted)],
                [from_chunks(g, batch, size) for g in (dq, dk)],
                allow_unused=True,
            )
            for target, grad in zip((grad_query, grad_key), grads, strict=False):
                torch.mul(grad, scale, out=target[:, :, part])
            for i, grad in zip(wanted, grads[2:], strict=True):
                if grad is not None:
                    grad_parameters[i] += grad
        return grad_query, grad_key, grad_value, *[None] * 7, *cast_like(grad_parameters, parameters)


def _numerator_grad(grad_out: Tensor, grad_den: Tensor, out: Tensor, den: Tensor, eps: float | None) -> Tensor:
    """Gradients of numerator and denominator side by side, `[B, H, t, Dv + 1]`, in the dtype of `den`."""
    if eps is None:
        return torch.cat([grad_out, grad_den[..., None]], dim=-1)
    grad_numerator = grad_out * (den + eps).reciprocal()[..., None]
    return torch.cat([grad_numerator, (grad_den - (grad_numerator * out).sum(-1))[..., None]], dim=-1)
