"""Compute the gated delta rule by the CPU kernels: those of the op `delta`, with a gate per token."""

import torch

from ... import native
from ..delta.cpu import gated_or_not
from ..programs import transformed

devices = ("cpu",)
dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
available = native.missing


def unfit(query, key, value, beta, log_gate, state, chunk):
    """Return why the kernel cannot serve the call, in words, or None."""
    if transformed() or torch.jit.is_tracing():
        return "torch.func and torch.jit.trace take torch's own operations only"
    return None


def run(query, key, value, beta, log_gate, state, chunk):
    """Return what `causal_gated_delta` returns; takes its arguments in order, `chunk` without effect."""
    return gated_or_not(query, key, value, beta, log_gate, state)
