"""Compute the delta rule by the CPU kernels: the recurrence over corrected values, and its gradient by chunks.

The op `gated_delta` runs here too: the delta rule with a gate. The backward pass keeps the inputs, and makes what is
corrected and the states again.
"""

import torch
from torch import Tensor

from ... import native
from ..heads import compute_dtype
from ..programs import transformed

devices = ("cpu",)
dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
available = native.missing


def unfit(query, key, value, beta, state, chunk):
    """Return why the kernel cannot serve the call, in words, or None."""
    if transformed() or torch.jit.is_tracing():
        return "torch.func and torch.jit.trace take torch's own operations only"
    return None


def run(query, key, value, beta, state, chunk):
    """Return what `causal_delta` returns; takes its arguments in order, `chunk` without effect."""
    return gated_or_not(query, key, value, beta, None, state)


def gated_or_not(query, key, value, beta, log_gate, state) -> tuple[Tensor, Tensor]:
    """Return what `causal_gated_delta` returns, and what `causal_delta` returns where `log_gate` is None."""
    given, dtype = query.dtype, compute_dtype(query.dtype)
    common = torch.float32 if given == torch.float16 else given
    q, k, v = (x if x.dtype == common else x.to(common) for x in (query, key, value))
    beta, log_gate, state = (x if x is None or x.dtype == dtype else x.to(dtype) for x in (beta, log_gate, state))
    if native.by_hand(q, k, v, beta, log_gate):
        out, after = _forward(q, k, v, beta, log_gate, state)
    else:
        out, after = forward(q, k, v, beta, log_gate, state)
        after = after.detach()
    return out if out.dtype == given else out.to(given), after


def _call(q, k, v, beta, gate, state) -> native.Delta:
    """Return the structure that forward and backward pass have in common; keeps nothing alive."""
    batch, heads, length, dim = q.shape
    return native.Delta(
        threads=torch.get_num_threads(),
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        length=length,
        dim=dim,
        value_dim=v.shape[-1],
        type=int(q.dtype == torch.bfloat16),
        q=native.strided(q),
        k=native.strided(k),
        v=native.strided(v),
        beta=native.strided(beta),
        gate=native.strided(gate),
        state=native.pointer(state),
    )


def _prepared(q, k, v, beta, log_gate, state):
    """Return the tensors as kernels take them: rows side by side, gates as factors, the state contiguous."""
    gate, state = None if log_gate is None else log_gate.exp(), None if state is None else state.contiguous()
    return *(native.rows(t) for t in (q, k, v)), beta, gate, state


def _results(q, k, v) -> tuple[Tensor, Tensor]:
    """Return memory for the output and for the state."""
    batch, heads, length, dim = q.shape
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, k.shape[1], dim, v.shape[-1], dtype=compute_dtype(q.dtype))


def _forward(q, k, v, beta, log_gate, state) -> tuple[Tensor, Tensor]:
    out, after = _results(q, k, v)
    tensors = _prepared(q, k, v, beta, log_gate, state)
    call = _call(*tensors)
    call.out, call.after = native.strided(out), native.pointer(after)
    native.run("delta_forward", after.dtype, call)
    return out, after


@torch.library.custom_op("hf_attnswap::delta", mutates_args=(), device_types="cpu")
def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_gate: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return output and last state; see `Delta` in `native/src/interface.h` for the arguments.

    Args:
        log_gate: log of what is left of the state as a token comes, `[B, Hkv, T]`; None for 0.
    """
    return _forward(q, k, v, beta, log_gate, state)


@forward.register_fake
def _(q, k, v, beta, log_gate, state):
    return _results(q, k, v)


@torch.library.custom_op("hf_attnswap::delta_backward", mutates_args=(), device_types="cpu")
def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_gate: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, beta and log_gate, in the dtype of `beta`; empty for what is None."""
    results = _gradients(q, k, v, beta, log_gate)
    dq, dk, dv, dbeta, dgate = results
    grad_out, tensors = native.rows(grad_out.to(beta.dtype)), _prepared(q, k, v, beta, log_gate, state)
    call = _call(*tensors)
    call.go, call.dq, call.dk, call.dv = (native.strided(t) for t in (grad_out, dq, dk, dv))
    call.dbeta = native.pointer(dbeta)
    if log_gate is not None:
        passed = [torch.empty_like(dgate) for _ in range(2)]
        call.gate_q, call.gate_k = (native.pointer(t) for t in passed)
    native.run("delta_backward", beta.dtype, call)
    if log_gate is not None:
        dgate.copy_((passed[0] - passed[1]).double().flip(-1).cumsum(-1).flip(-1))
    return results


def _gradients(q, k, v, beta, log_gate) -> tuple[Tensor, ...]:
    """Return memory for the gradients, those of rows laid out as [B, T, H, D]; without elements for what is None."""
    rows = (beta.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))
    return *rows, beta.new_empty(beta.shape), beta.new_empty(0 if log_gate is None else log_gate.shape)


@backward.register_fake
def _(grad_out, q, k, v, beta, log_gate, state):
    return _gradients(q, k, v, beta, log_gate)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out, _grad_state):
    q, k, v, beta, log_gate, state = ctx.saved_tensors
    dq, dk, dv, dbeta, dgate = backward(grad_out, q, k, v, beta, log_gate, state)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbeta, None if log_gate is None else dgate, None


forward.register_autograd(_backward, setup_context=_keep)
