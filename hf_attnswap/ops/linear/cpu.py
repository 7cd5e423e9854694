"""Compute causal linear attention by the CPU kernels: map, recurrence and division in one pass over the tokens.

The maps identity, elu, relu and hedgehog are made in the kernel. The features of any other map are made before it, by
blocks of tokens, and have no backward pass here. The kernel's backward pass keeps query, key, value, output and
denominator, and makes features and states again.
"""

import functools
import threading

import torch
from torch import Tensor

from ... import native
from ..heads import compute_dtype, in_dtype
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
    if transformed() or torch.jit.is_tracing():
        return "torch.func and torch.jit.trace take torch's own operations only"
    if kernel_of(map_query, map_key) is None and (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return f"the map {map_query.name} is not one of the kernel's, and has no gradient beside it"
    return None


def run(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, causal, log_decay):
    """Return what `causal_linear` returns; takes its arguments in order, with `causal` before the last."""
    dtype, kind = compute_dtype(query.dtype), kernel_of(map_query, map_key)
    if kind is None:
        return _of_features(query, key, value, map_query, map_key, scale, key_mask, state, eps, log_decay)
    own = matrices(kind, map_query, map_key, dtype)
    gate = gates(log_decay, key, key_mask)
    if key_mask is None and fits_step(query, key, value, state):
        return _step(query, key, value, gate, state, *own, kind, float(scale), eps)
    return _run(query, key, value, gate, key_mask, state, *own, kind, float(scale), eps)


def fits_step(query, key, value, state) -> bool:
    """Return whether a call is one token after a state without a gradient, in tensors that kernels take as they are."""
    if query.shape[2] != 1 or state is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    given = query.dtype
    if given == torch.float16 or key.dtype != given or value.dtype != given or state.dtype != compute_dtype(given):
        return False
    return type(query) is type(state) is Tensor and all(t.is_contiguous() for t in (query, key, value, state))


def _step(query, key, value, log_gate, state, wq, wk, kind, scale, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `run` returns where `fits_step` holds: one call of the kernel with arguments that are prepared."""
    batch, heads, _, dim = query.shape
    _, kv_heads, _, value_dim = value.shape
    dtype = state.dtype
    out = query.new_empty(batch, heads, 1, value_dim, dtype=dtype if eps is None else query.dtype)
    den, after = state.new_empty(batch, heads, 1), torch.empty_like(state)
    sizes = (batch, heads, kv_heads, dim, value_dim, query.dtype, kind, scale, eps)
    call = _prepared_step(threading.get_ident(), torch.get_num_threads(), *sizes)
    more = [None if t is None else t.contiguous() for t in (wq, wk, None if log_gate is None else log_gate.exp())]
    call(*map(native.pointer, (query, key, value, out, den, state, after, *more)))
    return out, den, after


@functools.lru_cache
def _prepared_step(thread, threads, batch, heads, kv_heads, dim, value_dim, dtype, kind, scale, eps) -> native.Prepared:
    """Return the call of a step, for the calling thread; its tensors are contiguous."""
    call = native.Linear(
        threads=threads,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        length=1,
        dim=dim,
        value_dim=value_dim,
        type=int(dtype == torch.bfloat16),
        map=kind,
        undivided=eps is None,
        scale=scale,
        eps=eps or 0.0,
        q=native.side_by_side(heads, dim),
        k=native.side_by_side(kv_heads, dim),
        v=native.side_by_side(kv_heads, value_dim),
        out=native.side_by_side(heads, value_dim),
        gate=native.side_by_side(kv_heads, 1),
    )
    fields = "q", "k", "v", "out", "den", "state", "after", "wq", "wk", "gate"
    return native.Prepared("linear_forward", compute_dtype(dtype), call, fields)


def gates(log_decay: Tensor | None, key: Tensor, counted: Tensor | None) -> Tensor | None:
    """Return a decay per key/value head, `[Hkv]`, as the log of a gate per token, `[B, Hkv, T]`; None for None.

    Args:
        key: `[B, Hkv, T, D]`, for its shape and dtype.
        counted: bool `[1 or B, T]`, the tokens with which the state fades; None for all.
    """
    if log_decay is None:
        return None
    gate = log_decay.to(compute_dtype(key.dtype))[:, None].expand(key.shape[:3])
    return gate if counted is None else gate * counted[:, None].to(gate.dtype)


def on_features(query, key, value, log_gate, state, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `causal_gated` returns: output, denominator and last state, by the recurrence over features.

    Takes the arguments of `causal_gated`, with the gate in `compute_dtype`.
    """
    return _run(query, key, value, log_gate, None, state, None, None, 0, 1.0, eps)


def _run(query, key, value, log_gate, mask, state, wq, wk, kind, scale, eps):
    given, dtype = query.dtype, compute_dtype(query.dtype)
    common = torch.float32 if given == torch.float16 else given
    # A step of generation lasts microseconds, as each of these conversions does.
    q, k, v = (x if x.dtype == common else x.to(common) for x in (query, key, value))
    state = state if state is None or state.dtype == dtype else state.to(dtype)
    arguments = (q, k, v, log_gate, mask, state, wq, wk, kind, scale, eps, False)
    if native.by_hand(q, k, v, log_gate, wq, wk):
        out, den, after, _ = _forward(*arguments)
    else:
        out, den, after, _ = forward(*arguments)
        after = after.detach()
    return out if eps is None or out.dtype == given else out.to(given), den, after


def matrices(kind, map_query, map_key, dtype) -> list[Tensor | None]:
    """Return the matrices of the maps of queries and of keys; None for a map without."""
    return [in_dtype(m.tensors["delta"], dtype) for m in (map_query, map_key)] if kind == _HEDGEHOG else [None, None]


def kernel_of(map_query, map_key) -> int | None:
    """Return the kernel's number of the map, None for a map that it does not have."""
    return _MAPS.get(map_query.name) if map_query.name == map_key.name else None


def hybrid_branch(query, key, value, mask, gate, state, map_query, map_key, log_mix, out, lse) -> Tensor:
    """Join linear attention to the output of a softmax, in place, and return the state after the last token.

    Args:
        query, key, value: in `compute_dtype`; key and value of the token that each row adds, where `mask` `[B, T]` does
            not switch it off. gate: as `gates` returns it. state, map_query, map_key: as in `causal_linear`, maps of
            `kernel_of`.
        log_mix: log of the factor of the linear branch, `[H]`.
        out: `[B, H, T, Dv]`, the output of the softmax; becomes that of both. lse: `[B, H, T]`, the log of its mass.
    """
    kind, dtype = kernel_of(map_query, map_key), query.dtype
    own = matrices(kind, map_query, map_key, dtype)
    _, den, after, _ = _results(query, key, value, kind, 0.0)
    state = None if state is None else state.to(dtype)
    tensors = _prepared(query, key, value, gate, mask, state, *own)
    call = _call(*tensors, kind, 1.0, 0.0, out, den)
    lse, log_mix = lse.contiguous(), log_mix.to(dtype).contiguous()
    call.beside, call.after = 1, native.pointer(after)
    call.lse, call.log_mix = native.pointer(lse), native.pointer(log_mix)
    native.run("linear_forward", dtype, call)
    return after


def branch(query, key, value, mask, gate, state, map_query, map_key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what a hybrid joins, with a gradient: numerator, denominator, last state, and what the queries left out.

    Takes the first arguments of `hybrid_branch`. The last output is the log of a factor of each row, `[B, H, T]`, a
    constant to the gradient.
    """
    kind = kernel_of(map_query, map_key)
    own = matrices(kind, map_query, map_key, query.dtype)
    numerator, den, after, left = forward(query, key, value, gate, mask, state, *own, kind, 1.0, None, True)
    return numerator, den, after.detach(), left.detach()


def _of_features(query, key, value, map_query, map_key, scale, key_mask, state, eps, log_decay):
    """Return what `run` returns without a gradient, block by block of tokens, whose features are made first."""
    dtype, length = compute_dtype(query.dtype), key.shape[2]
    out, den = empty_result(query, value, dtype if eps is None else query.dtype)
    for start in range(0, max(length, 1), _TOKENS):
        part = slice(start, start + _TOKENS)
        q, k = (mapped(scaled(x[:, :, part], dtype, scale), m) for x, m in ((query, map_query), (key, map_key)))
        mask = None if key_mask is None else key_mask[:, part]
        state = None if state is None else state.to(dtype)
        now = (q, k, value[:, :, part].to(dtype), gates(log_decay, k, mask), mask, state, None, None)
        out[:, :, part], den[:, :, part], state, _ = _forward(*now, 0, 1.0, eps, False)
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


def _results(q, k, v, kind, eps, beside=False) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return memory for the output, the denominator, the state, and, where `beside`, what the queries leave out."""
    batch, heads, length, dim = q.shape
    dtype, features = compute_dtype(q.dtype), dim * (2 if kind == _HEDGEHOG else 1)
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = q.new_empty(batch, length, heads, v.shape[-1], dtype=q.dtype if eps is not None else dtype).transpose(1, 2)
    den = q.new_empty(batch, heads, length, dtype=dtype)
    after = q.new_empty(batch, k.shape[1], features, v.shape[-1] + 1, dtype=dtype)
    return out, den, after, q.new_empty(batch, heads, length, dtype=dtype) if beside else None


def _prepared(q, k, v, gate, mask, state, wq, wk):
    """Return the tensors as kernels take them: rows side by side, the others contiguous, gates as factors."""
    gate = None if gate is None else gate.exp()
    mask, state, wq, wk = (None if t is None else t.contiguous() for t in (mask, state, wq, wk))
    return *(native.rows(t) for t in (q, k, v)), gate, mask, state, wq, wk


def _forward(
    q, k, v, log_gate, mask, state, wq, wk, kind, scale, eps, beside
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    out, den, after, left = _results(q, k, v, kind, eps, beside)
    tensors = _prepared(q, k, v, log_gate, mask, state, wq, wk)
    call = _call(*tensors, kind, scale, eps, out, den)
    call.beside, call.after = beside, native.pointer(after)
    call.left = native.pointer(left)
    native.run("linear_forward", den.dtype, call)
    return out, den, after, left


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
    beside: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output, denominator and last state; see `Linear` in `native/src/interface.h` for the arguments.

    Args:
        log_gate: log of what is left of the state as a token comes, `[B, Hkv, T]`; None for 0.
        beside: whether queries keep their scale, as beside a softmax; then the last output is the log of a factor that
            their features leave out, `[B, H, T]`, a constant to the gradient. Empty otherwise.
    """
    *results, left = _forward(q, k, v, log_gate, mask, state, wq, wk, kind, scale, eps, beside)
    return *results, q.new_empty(0) if left is None else left


@forward.register_fake
def _(q, k, v, log_gate, mask, state, wq, wk, kind, scale, eps, beside):
    *results, left = _results(q, k, v, kind, eps, beside)
    return *results, q.new_empty(0) if left is None else left


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
    beside: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, log_gate, wq and wk, in the dtype of `den`; empty for what is None."""
    results = _gradients(den, q, k, v, log_gate, wq, wk)
    dq, dk, dv, dgate, dwq, dwk = results
    grad_out, tensors = native.rows(grad_out.to(den.dtype)), _prepared(q, k, v, log_gate, mask, state, wq, wk)
    grad_den = grad_den.contiguous()
    call = _call(*tensors, kind, scale, eps, out, den)
    call.beside = beside
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
def _(grad_out, grad_den, out, den, q, k, v, log_gate, mask, state, wq, wk, kind, scale, eps, beside):
    return _gradients(den, q, k, v, log_gate, wq, wk)


def _keep(ctx, inputs, output):
    *tensors, kind, scale, eps, beside = inputs
    ctx.numbers = kind, scale, eps, beside
    out, den, _, _ = output
    ctx.save_for_backward(out, den, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_den, _grad_state, _grad_left):
    out, den, *tensors = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_den = torch.zeros_like(den) if grad_den is None else grad_den
    dq, dk, dv, dgate, dwq, dwk = backward(grad_out, grad_den, out, den, *tensors, *ctx.numbers)
    q, k, v, log_gate, _, _, wq, wk = tensors
    pairs = ((dq, q), (dk, k), (dv, v), (dgate, log_gate), (None, None), (None, None), (dwq, wq), (dwk, wk))
    return *(None if t is None else grad.to(t.dtype) for grad, t in pairs), None, None, None, None


forward.register_autograd(_backward, setup_context=_keep)
