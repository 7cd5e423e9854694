"""Compute gated linear attention on a GPU by the Triton kernels of the op `linear`, with a gate per token.

The kernels pass Triton's interpreter and compile for sm_80 and sm_90.
"""

import torch

from .. import gpu
from ..linear.triton import IDENTITY, on_features, step

devices = gpu.DEVICES
dtypes = gpu.DTYPES
available = gpu.missing


def unfit(query, key, value, log_gate, state, eps, chunk):
    """Return why the kernels cannot serve the call, in words, or None."""
    return gpu.unfit(query, key, value)


def run(query, key, value, log_gate, state, eps, chunk):
    """Return what `causal_gated` returns; takes its arguments in order, `chunk` without effect."""
    given = query.dtype
    query, key, value = gpu.for_products(query, key, value)
    state = None if state is None else state.detach().float().contiguous()
    if query.shape[2] == 1 and state is not None and not torch.is_grad_enabled():
        out, *rest = step(query, key, value, (None, None), None, log_gate[..., 0], state, IDENTITY, 1.0, eps)
    else:
        out, *rest = on_features(query, key, value, None, log_gate, state, IDENTITY, 1.0, eps)
    return out if eps is None else out.to(given), *rest
