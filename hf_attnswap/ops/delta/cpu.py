"""Compute the delta rule by the CPU kernels, without a gradient: the recurrence over corrected values."""

import torch

from ... import native
from ..heads import compute_dtype
from ..programs import transformed

devices = ("cpu",)
dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
available = native.missing


def unfit(query, key, value, beta, state, chunk):
    """Return why the kernel cannot serve the call, in words, or None."""
    if transformed() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return "torch's own operations only are compiled and transformed"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, beta)):
        return "the kernel has no gradient"
    return None


def run(query, key, value, beta, state, chunk):
    """Return what `causal_delta` returns; takes its arguments in order, `chunk` without effect."""
    dtype, given = compute_dtype(query.dtype), query.dtype
    common = torch.float32 if given == torch.float16 else given
    q, k, v = (native.rows(t.to(common)) for t in (query, key, value))
    beta, state = beta.to(dtype), None if state is None else state.to(dtype).contiguous()
    batch, heads, length, dim = q.shape
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
    after = q.new_empty(batch, k.shape[1], dim, v.shape[-1], dtype=dtype)
    call = native.Delta(
        threads=torch.get_num_threads(),
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        length=length,
        dim=dim,
        value_dim=v.shape[-1],
        type=int(common == torch.bfloat16),
        q=native.strided(q),
        k=native.strided(k),
        v=native.strided(v),
        beta=native.strided(beta),
        out=native.strided(out),
        state=native.pointer(state),
        after=native.pointer(after),
    )
    native.run("delta_forward", dtype, call)
    return out.to(given), after
