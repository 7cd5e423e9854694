"""Compute window attention by the CPU kernels: tiles of 16 rows of the heads that share a key, scores transposed."""

import functools
import threading

import torch
from torch import Tensor

from ... import native
from ..heads import compute_dtype
from ..programs import transformed
from ..sliding import Context, Step, WindowState, context

devices = ("cpu",)
dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
available = native.missing


def unfit(query, key, value, scaling, window, sinks, valid, state, keep_state, reach):
    """Return why the kernel cannot serve the call, in words, or None."""
    if transformed() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return "torch's own operations only are compiled and transformed"
    return None if reach is None else "sinks that go out of reach are not known to the kernel"


def run(query, key, value, scaling, window, sinks, valid, state, keep_state, reach):
    """Return what `window_attention` returns; takes its arguments in order."""
    if valid is None and state is None and not keep_state:
        parts = softmax_of_text(query, key, value, scaling, window, sinks)
        return parts[0].to(query.dtype), None
    if fits_step(query, key, value, valid, window, sinks, state):
        out, after = step(query, key, value, scaling, window, sinks, state)
        return out, after if keep_state else None
    at = context(query, key, value, valid, window, sinks, state)
    if isinstance(at, Step):
        numerator, denominator, _ = at.softmax_parts(scaling)
        out = numerator / denominator
    else:
        out = at.unalign(softmax_of_context(at, scaling)[0])
    return out.to(query.dtype), at.state() if keep_state else None


def fits_step(query, key, value, valid, window, sinks, state) -> bool:
    """Return whether `step` serves the call: a token after a state with all sinks, no padding, no gradient, whole
    vectors."""
    if query.shape[2] != 1 or valid is not None or state is None or torch.is_grad_enabled():
        return False
    if state.first(window, sinks) < sinks:
        return False
    kept = all(t.dtype == compute_dtype(t.dtype) == query.dtype for t in (key, value, state.key, state.value))
    return kept and key.shape[-1] % 16 == 0 and value.shape[-1] % 16 == 0


def step(query, key, value, scaling, window, sinks, state, lse=None, leaves=None) -> tuple[Tensor, WindowState]:
    """Return the output of one token after a state, and the state with the token.

    Args:
        lse: memory for the log of the mass, `[B, H, 1]`; None where nobody asks for it. leaves: memory for whether the
            oldest token beside the sinks leaves the window, bool `[B, 1]`; None where nobody asks.
    """
    batch, heads, _, dim = query.shape
    _, kv_heads, _, value_dim = value.shape
    given = [t.contiguous() for t in (query, key, value, state.key, state.value, state.count)]
    slots = state.key.shape[2]
    now = min(slots + 1, sinks + window)
    new_k, new_v = key.new_empty(batch, kv_heads, now, dim), value.new_empty(batch, kv_heads, now, value_dim)
    out, after = query.new_empty(batch, heads, 1, value_dim), torch.empty_like(given[-1])
    sizes = (batch, heads, kv_heads, dim, value_dim, window, sinks, slots, float(scaling), query.dtype)
    call = _prepared_step(threading.get_ident(), torch.get_num_threads(), *sizes)
    call(*map(native.pointer, (*given, new_k, new_v, out, after, lse, leaves)))
    return out, WindowState(new_k, new_v, after)


@functools.lru_cache
def _prepared_step(
    thread, threads, batch, heads, kv_heads, dim, value_dim, window, sinks, slots, scaling, dtype
) -> native.Prepared:
    """Return the call of a step, for the calling thread; its tensors are contiguous."""
    now = min(slots + 1, sinks + window)
    call = native.WindowStep(
        threads=threads,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        value_dim=value_dim,
        window=window,
        sinks=sinks,
        slots=slots,
        scaling=scaling,
        q=native.side_by_side(heads, dim),
        k=native.side_by_side(kv_heads, dim),
        v=native.side_by_side(kv_heads, value_dim),
        old_k=native.side_by_side(kv_heads, dim, slots),
        old_v=native.side_by_side(kv_heads, value_dim, slots),
        new_k=native.side_by_side(kv_heads, dim, now),
        new_v=native.side_by_side(kv_heads, value_dim, now),
        out=native.side_by_side(heads, value_dim),
    )
    fields = "q", "k", "v", "old_k", "old_v", "count", "new_k", "new_v", "out", "next", "lse", "leaves"
    return native.Prepared("window_step", dtype, call, fields)


def softmax_of_text(query, key, value, scaling, window, sinks) -> tuple[Tensor, Tensor]:
    """Return what `softmax_of_context` returns, for a whole text without padding."""
    q, k, v = (native.whole_vectors(t.to(compute_dtype(query.dtype))) for t in (query, key, value))
    first = slice(0, sinks)
    return _softmax(q, k, v, k[:, :, first], v[:, :, first], None, scaling, min(window, key.shape[2]), sinks, 0, value)


def softmax_of_context(at: Context, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the output of the aligned rows, `[B, H, T, Dv]`, and the log of the mass of each, `[B, H, T]`.

    Both are in `compute_dtype`. The mass is -inf, and the output 0, where a row sees nothing.
    """
    given = at.query, at.key, at.value, at.sink_key, at.sink_value
    tensors = (native.whole_vectors(t.to(compute_dtype(at.query.dtype))) for t in given)
    return _softmax(*tensors, at.count, scaling, at.window, at.sinks, at.window, at.value)


def _softmax(q, k, v, sink_k, sink_v, count, scaling, window, sinks, ahead, value) -> tuple[Tensor, Tensor]:
    """Return output and log of the mass; `value` has the width of the output, to which v is filled up."""
    run = _forward if native.by_hand(q, k, v, sink_k, sink_v) else forward
    out, lse = run(q, k, v, sink_k, sink_v, count, float(scaling), window, sinks, ahead)
    return out[..., : value.shape[-1]], lse


def _call(q, k, v, sink_k, sink_v, count, scaling, window, sinks, ahead, out, lse) -> native.Window:
    """Return the structure that forward and backward pass have in common."""
    return native.Window(
        threads=torch.get_num_threads(),
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        length=q.shape[2],
        dim=q.shape[3],
        value_dim=v.shape[3],
        window=window,
        sinks=min(sinks, sink_k.shape[2]),
        ahead=ahead,
        parts=1,
        scaling=scaling,
        q=native.strided(q),
        k=native.strided(k),
        v=native.strided(v),
        sink_k=native.strided(sink_k),
        sink_v=native.strided(sink_v),
        out=native.strided(out),
        count=native.pointer(count),
        lse=native.pointer(lse),
    )


def _results(q, v) -> tuple[Tensor, Tensor]:
    """Return memory for the output and for the log of the mass of each row."""
    batch, heads, length, _ = q.shape
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    return q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2), q.new_empty(batch, heads, length)


def _forward(q, k, v, sink_k, sink_v, count, *numbers) -> tuple[Tensor, Tensor]:
    out, lse = _results(q, v)
    q, k, v, sink_k, sink_v = (native.rows(t) for t in (q, k, v, sink_k, sink_v))
    native.run("window_forward", q.dtype, _call(q, k, v, sink_k, sink_v, count, *numbers, out, lse))
    return out, lse


@torch.library.custom_op("hf_attnswap::window", mutates_args=(), device_types="cpu")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    count: Tensor | None,
    scaling: float,
    window: int,
    sinks: int,
    ahead: int,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log of the mass; see `Window` in `native/src/interface.h` for the arguments."""
    return _forward(q, k, v, sink_k, sink_v, count, scaling, window, sinks, ahead)


@forward.register_fake
def _(q, k, v, *rest):
    return _results(q, v)


@torch.library.custom_op("hf_attnswap::window_backward", mutates_args=(), device_types="cpu")
def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    count: Tensor | None,
    scaling: float,
    window: int,
    sinks: int,
    ahead: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and of the keys and values of the sinks."""
    grad_out, grad_lse, q = native.rows(grad_out), grad_lse.contiguous(), native.rows(q)
    shared = [native.rows(t) for t in (k, v, sink_k, sink_v)]
    call = _call(q, *shared, count, scaling, window, sinks, ahead, out, lse)
    batch, heads, length, dim = q.shape
    pairs = batch * k.shape[1]
    # Each part of the rows sums for itself, so that results do not depend on who is first.
    call.parts = parts = 1 if call.threads == 1 else max(1, min(call.threads * 2 // pairs, -(-length // 64)))
    dq = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    sums = [t.new_zeros(parts * batch, *t.shape[1:]) for t in shared]
    call.go, call.glse, call.dq = native.strided(grad_out), native.pointer(grad_lse), native.strided(dq)
    call.dk, call.dv, call.dsink_k, call.dsink_v = (native.strided(t) for t in sums)
    native.run("window_backward", q.dtype, call)
    return dq, *(t.unflatten(0, (parts, batch)).sum(0) if parts > 1 else t for t in sums)


@backward.register_fake
def _(grad_out, grad_lse, out, lse, q, k, v, sink_k, sink_v, *rest):
    batch, heads, length, dim = q.shape
    dq = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    return dq, *(t.new_empty(t.shape) for t in (k, v, sink_k, sink_v))


def _keep(ctx, inputs, output):
    *tensors, scaling, window, sinks, ahead = inputs
    ctx.numbers = scaling, window, sinks, ahead
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    out, lse, *tensors = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    return *backward(grad_out, grad_lse, out, lse, *tensors, *ctx.numbers), *[None] * 5


forward.register_autograd(_backward, setup_context=_keep)
