"""Write into a program of torch what is to be one node of an ONNX graph.

Where torch itself runs such a program, the node gives zeros of the right shape.
"""

import torch
from torch import Tensor

DOMAIN = "hf_attnswap"  # of the functions that a graph brings


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
