"""Compute causal linear attention by blocks of a few chunks in turn.

Features are made block by block, while they fit in a core's cache, so that no `n x F` tensor is written. The backward
pass keeps query, key, value, the output, and the state at the start of every block, and makes the features again.
"""

import torch

from ..chunks import blocks, by_heads, from_chunks, product, to_chunks, tril_
from ..heads import cast_like, compute_dtype, distinct
from ..states import faded, fading, linear_block, numerator_grad, running_sums, tokens_that_count, values_with_ones
from ._features import empty_result, mapped, scaled, write_result


def by_blocks(*arguments):
    """Return what `causal_linear` returns, without a gradient.

    Takes the arguments of `run` in the form `torch`, without `causal`.
    """
    return _by_blocks(*arguments)[:3]


def by_blocks_with_gradient(query, key, value, map_query, map_key, *rest):
    """Return what `causal_linear` returns, with a backward pass in O(n d) memory.

    Takes the arguments of `by_blocks`.
    """
    *rest, log_decay = rest
    tensors = distinct((*map_query.tensors.values(), *map_key.tensors.values()))
    return _CausalLinear.apply(query, key, value, log_decay, map_query, map_key, *rest, *tensors)


def _by_blocks(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, log_decay, keep_states=False):
    """Return output, denominator, last state, and the state before every block (empty unless `keep_states`)."""
    batch, heads, length, _ = query.shape
    kv_heads, dtype = value.shape[1], compute_dtype(query.dtype)
    out, den = empty_result(query, value, dtype if eps is None else query.dtype)
    S = None if state is None else state.to(dtype).flatten(0, 1)
    states = []
    for part in blocks(length, chunk):
        size = min(chunk, part.stop - part.start)
        q = mapped(scaled(query[:, :, part], dtype, scale), map_query)
        k = mapped(scaled(key[:, :, part], dtype, scale), map_key, key_mask, part)
        q, k, kept = _faded(q, k, log_decay, key_mask, part, size)
        q, k = (to_chunks(t, kv_heads, size) for t in (q, k))
        v = values_with_ones(value[:, :, part], size, dtype)
        if S is None:
            S = q.new_zeros(batch * kv_heads, q.shape[-1], v.shape[-1])
        if keep_states:
            states.append(S)
        mixed, S = linear_block(q, k, v, S, kept)
        mixed = by_heads(mixed, batch, size)
        shape = mixed.shape[:-1]
        write_result(
            mixed[..., :-1], mixed[..., -1:], out[:, :, part].view(*shape, -1), den[:, :, part].view(shape), eps
        )
    return out, den, S.unflatten(0, (batch, kv_heads)), states


def _faded(q, k, log_decay, key_mask, part, size):
    """Return the features of a block with the powers of the decay, and what remains over its chunks, or None."""
    if log_decay is None:
        return q, k, None
    counted = tokens_that_count(key_mask, part.stop, q.device)[:, part]
    return faded(q, k, *fading(log_decay.to(q.dtype), counted, size))


class _CausalLinear(torch.autograd.Function):
    """Run `_by_blocks` with a backward pass that makes the features of each block again.

    With v and dn the values and the numerator's gradient, both with the denominator's column, per chunk:

    P        = tril(dn v^T),  A = tril(phi(q) phi(k)^T)
    dphi(q)  = P phi(k) + dn S^T              (S: state before the chunk)
    dphi(k)  = P^T phi(q) + v R^T             (R = sum of phi(q)^T dn over later chunks)
    dv       = A^T dn + phi(k) R

    With a decay, phi(q) and phi(k) have its powers, and what remains of a state over its chunk, the factor a, stands on
    R: R is the gradient of the state at the end of the chunk times a, and da = <state at the end, its gradient> / a.
    """

    @staticmethod
    def forward(ctx, query, key, value, log_decay, map_query, map_key, scale, key_mask, state, eps, chunk, *tensors):
        arguments = (query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, log_decay)
        out, den, S, states = _by_blocks(*arguments, keep_states=True)
        ctx.save_for_backward(query, key, value, log_decay, key_mask, out, den, S, torch.stack(states), *tensors)
        ctx.maps, ctx.scale, ctx.eps, ctx.chunk = (map_query, map_key), scale, eps, chunk
        ctx.mark_non_differentiable(S)
        return out, den, S

    @staticmethod
    def backward(ctx, grad_out, grad_den, _grad_state):
        query, key, value, log_decay, key_mask, out, den, last, states, *tensors = ctx.saved_tensors
        batch, _, length, _ = query.shape
        kv_heads, dtype, scale = value.shape[1], compute_dtype(query.dtype), ctx.scale
        grad_query, grad_key, grad_value = (torch.empty_like(t) for t in (query, key, value))
        grad_tensors = [torch.zeros_like(t, dtype=compute_dtype(t.dtype)) for t in tensors]
        wanted = [i for i, t in enumerate(tensors) if t.requires_grad]
        grad_decay = None if log_decay is None else torch.zeros_like(log_decay, dtype=dtype)
        R, after = torch.zeros_like(states[0]), last.flatten(0, 1)
        for S, part in reversed(list(zip(states, blocks(length, ctx.chunk), strict=True))):
            size = min(ctx.chunk, part.stop - part.start)
            with torch.enable_grad():
                leaves = [scaled(t[:, :, part].detach(), dtype, scale).requires_grad_() for t in (query, key)]
                features = [mapped(leaves[0], ctx.maps[0]), mapped(leaves[1], ctx.maps[1], key_mask, part)]
                decay = None if log_decay is None else log_decay.detach().to(dtype).requires_grad_()
                *features, kept = _faded(*features, decay, key_mask, part, size)
            q, k = (to_chunks(t.detach(), kv_heads, size) for t in features)
            v = values_with_ones(value[:, :, part], size, dtype)
            dn = numerator_grad(grad_out[:, :, part], grad_den[:, :, part], out[:, :, part], den[:, :, part], ctx.eps)
            dn = to_chunks(dn, kv_heads, size)
            remaining = None if kept is None else kept.detach()
            S, _ = running_sums(S, k, v, remaining)
            Rs, R = running_sums(R, q, dn, remaining, backwards=True)
            P = tril_(product(dn, v.mT), size)
            A = tril_(product(q, k.mT), size)
            dq = product(dn, S.mT, add_to=product(P, k))
            dk = product(v, Rs.mT, add_to=product(P.mT, q))
            dv = product(k, Rs, add_to=product(A.mT, dn))
            grad_value[:, :, part] = from_chunks(dv, batch, size)[..., :-1]
            outputs, grads = features, [from_chunks(g, batch, size) for g in (dq, dk)]
            sources = [*leaves, *(tensors[i] for i in wanted)]
            if decay is not None:
                ends = torch.cat([S[1:], after[None]])
                outputs, after = [*features, kept], S[0]
                grads.append((ends * Rs).sum((2, 3), keepdim=True) / remaining / remaining)
                sources.append(decay)
            grads = list(torch.autograd.grad(outputs, sources, grads, allow_unused=True))
            if decay is not None:
                grad_decay += grads.pop()
            for target, grad in zip((grad_query, grad_key), grads, strict=False):
                torch.mul(grad, scale, out=target[:, :, part])
            for i, grad in zip(wanted, grads[2:], strict=True):
                if grad is not None:
                    grad_tensors[i] += grad
        if grad_decay is not None:
            grad_decay = grad_decay.to(log_decay.dtype)
        return grad_query, grad_key, grad_value, grad_decay, *[None] * 7, *cast_like(grad_tensors, tensors)
