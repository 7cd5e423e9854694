"""Write into a program of torch what is to be one node of an ONNX graph.

Where torch itself runs such a program, the node gives zeros of the right shape.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import backends

DOMAIN = "hf_attnswap"  # of the functions that a graph brings
_here = threading.local()


@contextmanager
def making_graph() -> Iterator[None]:
    """Let every op of this thread write its nodes while the context is open: by `onnx`, and by `torch` without it."""
    forms = ["torch", *(f"{name}=onnx" for name, op in backends.OPS.items() if "onnx" in op.forms)]
    _here.graph = True
    try:
        with backends.backend(",".join(forms)):
            yield
    finally:
        del _here.graph


def unfit(*arguments) -> str | None:
    """Return why a form that writes nodes cannot serve a call, in words; None inside `making_graph`."""
    return None if hasattr(_here, "graph") else "no graph of ONNX is made of it"


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, *, log_gate: Tensor | None = None, beta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `o_i = q_i S_i` and the last state, as one node LinearAttention.

    `S_i = g_i S_{i-1} + k_i v_i^T`; with beta, `S_i = g_i S_{i-1} + beta_i k_i (v_i - g_i S_{i-1}^T k_i)^T`.

    Args:
        q: features `[B, H, T, F]`; k: `[B, Hkv, T, F]`; v: `[B, Hkv, T, E]`, all float32.
        state: `[B, Hkv, F, E]`; None for zeros.
        log_gate: log g, `[B, Hkv, T]`; None for g = 1. beta: `[B, Hkv, T]`.

    Returns:
        `[B, H, T, E]` and `[B, Hkv, F, E]`.
    """
    (batch, heads, length, width), kv_heads, columns = q.shape, k.shape[1], v.shape[-1]
    rule = "_".join(word for word, t in (("gated", log_gate), ("delta", beta)) if t is not None) or "linear"
    inputs = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
    inputs += [state, *(None if t is None else t.mT for t in (log_gate, beta))]
    while inputs[-1] is None:
        inputs.pop()
    out, after = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        inputs,
        {"q_num_heads": heads, "kv_num_heads": kv_heads, "update_rule": rule, "scale": 1.0},
        dtypes=(q.dtype, q.dtype),
        shapes=((batch, length, heads * columns), (batch, kv_heads, width, columns)),
        version=1,
    )
    return out.unflatten(2, (heads, columns)).transpose(1, 2), after
