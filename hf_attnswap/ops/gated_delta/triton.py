"""Compute the gated delta rule on a GPU by the Triton kernels of the op `delta`, with a gate per token."""

from .. import gpu
from ..delta import triton as delta

devices = gpu.DEVICES
dtypes = gpu.DTYPES
available = gpu.missing


def unfit(query, key, value, beta, log_gate, state, chunk):
    """Return why the kernels cannot serve the call, in words, or None."""
    return delta.unfit(query, key, value, beta, state, chunk)


def run(query, key, value, beta, log_gate, state, chunk):
    """Return what `causal_gated_delta` returns; takes its arguments in order, `chunk` without effect."""
    return delta.gated_or_not(query, key, value, beta, log_gate, state)
