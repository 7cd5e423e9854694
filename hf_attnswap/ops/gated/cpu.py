"""Compute gated linear attention by the CPU kernels: the recurrence of the op `linear`, with a gate per token."""

import torch

from ... import native
from ..heads import compute_dtype
from ..linear.cpu import on_features
from ..programs import transformed

devices = ("cpu",)
dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
available = native.missing


def unfit(query, key, value, log_gate, state, eps, chunk):
    """Return why the kernel cannot serve the call, in words, or None."""
    if transformed() or torch.jit.is_tracing():
        return "torch.func and torch.jit.trace take torch's own operations only"
    return None


def run(query, key, value, log_gate, state, eps, chunk):
    """Return what `causal_gated` returns; takes its arguments in order, `chunk` without effect."""
    return on_features(query, key, value, log_gate.to(compute_dtype(query.dtype)), state, eps)
