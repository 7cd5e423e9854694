"""Compute the gated delta rule on a GPU by the Triton kernels of the op `delta`, with a gate per token."""

from .. import gpu
from ..delta.triton import gated_or_not

devices = gpu.DEVICES
dtypes = gpu.DTYPES
available = gpu.missing


def unfit(query, key, value, beta, log_gate, state, chunk):
    """Return why the kernels cannot serve the call, in words, or None."""
    return gpu.unfit(query, key, value)


def run(query, key, value, beta, log_gate, state, chunk):
    """Return what `causal_gated_delta` returns; takes its arguments in order, `chunk` without effect."""
    return gated_or_not(query, key, value, beta, log_gate, state)
