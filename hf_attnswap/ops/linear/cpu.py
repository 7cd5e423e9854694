"""Compute causal linear attention by the CPU kernels: map, recurrence and division in one pass over the tokens.

The maps identity, elu, relu and hedgehog are made in the kernel. The features of any other map are made before it, by
blocks of tokens, and have no backward pass here. The kernel's backward pass keeps query, key, value, output and
denominator, and makes features and states again.
"""

import torch
from torch import Tensor

from ... import native
from ..heads import compute_dtype
from ..programs import transformed
from ._features import empty_result, mapped, scaled

devices = ("cpu",)
dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
available = native.missing

_MAPS = {"identity": 0, "elu": 1, "relu": 2, "hedgehog": 3}
_HEDGEHOG = 3
_TOKENS = 1024  # whose features are made at once


def unfit(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, causal, log_decay):
    """Return why the kernel cannot serve the call, in words, or None."""
    if not causal:
        return "attention to all keys is two products, which torch has"
    if log_decay is not None:
        return "the kernel has no decay"
    if transformed():
        return "torch.func transforms torch's own operations only"
    if kernel_of(map_query, map_key) is None and (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return f"the map {map_query.name} is not one of the kernel's, and has no gradient beside it"
    return None


def run(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, causal, log_decay):
    """Return what `causal_linear` returns; takes its arguments in order, and `causal`."""
    dtype, given, kind = compute_dtype(query.dtype), query.dtype, kernel_of(map_query, map_key)
    if kind is None:
        return _of_features(query, key, value, map_query, map_key, scale, key_mask, state, eps)
    matrices: tuple[Tensor | None, Tensor | None] = (None, None)
    if kind == _HEDGEHOG:
        matrices = tuple(m.tensors["delta"].to(dtype) for m in (map_query, map_key))
    common = torch.float32 if given == torch.float16 else query.dtype
    query, key, value = (x.to(common) for x in (query, key, value))
    state = None if state is None else state.to(dtype)
    arguments = (query, key, value, None, key_mask, state, *matrices, kind, float(scale), eps)
    run = _forward if native.by_hand(query, key, value, *matrices) else forward
    out, den, after = run(*arguments)
    return out if eps is None else out.to(given), den, after.detach()


def kernel_of(map_query, map_key) -> int | None:
    """Return the kernel's number of the map, None for a map that it does not have."""
    return _MAPS.get(map_query.name) if map_query.name == map_key.name else None


def hybrid_branch(query, key, value, mask, state, map_query, map_key, log_mix, out, lse) -> Tensor:
    """Join linear attention to the output of a softmax, in place, and return the state after the last token.

    Args:
        query, key, value: in `compute_dtype`; key and value of the token that each row adds, where `mask` `[B, T]` does
            not switch it off. state, map_query, map_key: as in `causal_linear`, maps of `kernel_of`.
        log_mix: log of the factor of the linear branch, `[H]`.
        out: `[B, H, T, Dv]`, the output of the softmax; becomes that of both. lse: `[B, H, T]`, the log of its mass.
    """
    kind, dtype = kernel_of(map_query, map_key), query.dtype
    matrices = [m.tensors["delta"].to(dtype) for m in (map_query, map_key)] if kind == _HEDGEHOG else [None, None]
    _, den, after = _results(query, key, value, kind, 0.0)
    state = None if state is None else state.to(dtype)
    tensors = _prepared(query, key, value, None, mask, state, *matrices)
    call = _call(*tensors, kind, 1.0, 0.0, out, den)
    lse, log_mix = lse.contiguous(), log_mix.to(dtype).contiguous()
    call.beside, call.after = 1, native.pointer(after)
    call.lse, call.log_mix = native.pointer(lse), native.pointer(log_mix)
    native.run("linear_forward", dtype, call)
    return after


def _of_features(query, key, value, map_query, map_key, scale, key_mask, state, eps):
    """Return what `run` returns without a gradient, block by block of tokens, whose features are made first."""
    dtype, length = compute_dtype(query.dtype), key.shape[2]
    out, den = empty_result(query, value, dtype if eps is None else query.dtype)
    for start in range(0, max(length, 1), _TOKENS):
        part = slice(start, start + _TOKENS)
        q, k = (mapped(scaled(x[:, :, part], dtype, scale), m) for x, m in ((query, map_query), (key, map_key)))
        mask = None if key_mask is None else key_mask[:, part]
        now = (q, k, value[:, :, part].to(dtype), None, mask, None if state is None else state.to(dtype), None, None)
        out[:, :, part], den[:, :, part], state = _forward(*now, 0, 1.0, eps)
    return out, den, state


def _call(q, k, v, gate, mask, state, wq, wk, kind, scale, eps, out, den) -> native.Linear:
    """Return the structure that forward and backward pass have in common."""
    batch, heads, length, dim = q.shape
    return native.Linear(
        threads=torch.get_num_threads(),
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        length=length,
        dim=dim,
        value_dim=v.shape[-1],
        type=int(q.dtype == torch.bfloat16),
        map=kind,
        undivided=eps is None,
        scale=scale,
        eps=eps or 0.0,
        q=native.strided(q),
        k=native.strided(k),
        v=native.strided(v),
        out=native.strided(out),
        gate=native.strided(gate),
        mask=native.pointer(mask),
        wq=native.pointer(wq),
        wk=native.pointer(wk),
        state=native.pointer(state),
        den=native.pointer(den),
    )


def _results(q, k, v, kind, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for the output, the denominator and the state."""
    batch, heads, length, dim = q.shape
    dtype, features = compute_dtype(q.dtype), dim * (2 if kind == _HEDGEHOG else 1)
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = q.new_empty(batch, length, heads, v.shape[-1], dtype=q.dtype if eps is not None else dtype).transpose(1, 2)
    den = q.new_empty(batch, heads, length, dtype=dtype)
    return out, den, q.new_empty(batch, k.shape[1], features, v.shape[-1] + 1, dtype=dtype)


def _prepared(q, k, v, gate, mask, state, wq, wk):
    """Return the tensors as kernels take them: rows side by side, the others contiguous, gates as factors."""
    gate = None if gate is None else gate.exp()
    mask, state, wq, wk = (None if t is None else t.contiguous() for t in (mask, state, wq, wk))
    return *(native.rows(t) for t in (q, k, v)), gate, mask, state, wq, wk


def _forward(q, k, v, log_gate, mask, state, wq, wk, kind, scale, eps) -> tuple[Tensor, Tensor, Tensor]:
    out, den, after = _results(q, k, v, kind, eps)
    tensors = _prepared(q, k, v, log_gate, mask, state, wq, wk)
    call = _call(*tensors, kind, scale, eps, out, den)
    call.after = native.pointer(after)
    native.run("linear_forward", den.dtype, call)
    return out, den, after


@torch.library.custom_op("hf_attnswap::linear", mutates_args=(), device_types="cpu")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    mask: Tensor | None,
    state: Tensor | None,
    wq: Tensor | None,
    wk: Tensor | None,
    kind: int,
    scale: float,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, denominator and last state; see `native/src/interface.h` for the arguments.

    Args:
        log_gate: log of what is left of the state as a token comes, `[B, Hkv, T]`; None for 0.
    """
    return _forward(q, k, v, log_gate, mask, state, wq, wk, kind, scale, eps)


@forward.register_fake
def _(q, k, v, log_gate, mask, state, wq, wk, kind, scale, eps):
    return _results(q, k, v, kind, eps)


@torch.library.custom_op("hf_attnswap::linear_backward", mutates_args=(), device_types="cpu")
def backward(
    grad_out: Tensor,
    grad_den: Tensor,
    out: Tensor,
    den: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    mask: Tensor | None,
    state: Tensor | None,
    wq: Tensor | None,
    wk: Tensor | None,
    kind: int,
    scale: float,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, log_gate, wq and wk, in the dtype of `den`; empty for what is None."""
    results = _gradients(den, q, k, v, log_gate, wq, wk)
    dq, dk, dv, dgate, dwq, dwk = results
    grad_out, tensors = native.rows(grad_out.to(den.dtype)), _prepared(q, k, v, log_gate, mask, state, wq, wk)
    grad_den = grad_den.contiguous()
    call = _call(*tensors, kind, scale, eps, out, den)
    call.go, call.gden = native.strided(grad_out), native.pointer(grad_den)
    call.dq, call.dk, call.dv = (native.strided(t) for t in (dq, dk, dv))
    if wq is not None:
        by_text = [t.new_empty(q.shape[0], *t.shape) for t in (dwq, dwk)]
        call.dwq, call.dwk = (native.pointer(t) for t in by_text)
    if log_gate is not None:
        passed = [torch.empty_like(dgate) for _ in range(2)]
        call.gate_q, call.gate_k = (native.pointer(t) for t in passed)
    native.run("linear_backward", den.dtype, call)
    if wq is not None:
        dwq.copy_(by_text[0].sum(0))
        dwk.copy_(by_text[1].sum(0))
    if log_gate is not None:
        dgate.copy_((passed[0] - passed[1]).double().flip(-1).cumsum(-1).flip(-1))
    return results


def _gradients(den, q, k, v, log_gate, wq, wk) -> tuple[Tensor, ...]:
    """Return memory for the gradients, laid out as [B, T, H, D]; without elements for what is None."""
    rows = (den.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))
    return *rows, *(den.new_empty(0 if t is None else t.shape) for t in (log_gate, wq, wk))


@backward.register_fake
def _(grad_out, grad_den, out, den, q, k, v, log_gate, mask, state, wq, wk, kind, scale, eps):
    return _gradients(den, q, k, v, log_gate, wq, wk)


def _keep(ctx, inputs, output):
    *tensors, ctx.kind, ctx.scale, ctx.eps = inputs
    out, den, after = output
    ctx.save_for_backward(out, den, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_den, _grad_state):
    out, den, *tensors = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_den = torch.zeros_like(den) if grad_den is None else grad_den
    dq, dk, dv, dgate, dwq, dwk = backward(grad_out, grad_den, out, den, *tensors, ctx.kind, ctx.scale, ctx.eps)
    q, k, v, log_gate, _, _, wq, wk = tensors
    pairs = ((dq, q), (dk, k), (dv, v), (dgate, log_gate), (None, None), (None, None), (dwq, wq), (dwk, wk))
    return *(None if t is None else grad.to(t.dtype) for grad, t in pairs), None, None, None


forward.register_autograd(_backward, setup_context=_keep)
