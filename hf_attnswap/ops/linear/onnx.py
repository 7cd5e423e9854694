"""Write causal linear attention as the node LinearAttention of ONNX, which onnxruntime computes."""

import torch
import torch.nn.functional as F

from ..nodes import linear_attention, unfit  # noqa: F401
from ..states import divided
from . import torch as portable
from ._features import mapped, scaled


def run(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, causal, log_decay):
    """Return what `causal_linear` returns, or by `torch` what `full_linear` returns; takes the arguments of `torch`."""
    if not causal:
        return portable.run(
            query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, causal, log_decay
        )
    q = mapped(scaled(query, torch.float32, scale), map_query)
    k = mapped(scaled(key, torch.float32, scale), map_key, key_mask)
    v = F.pad(value.float(), (0, 1), value=1.0)
    gate = None
    if log_decay is not None:
        gate = log_decay.float()[None, :, None].expand(k.shape[:3])
        gate = gate if key_mask is None else gate * key_mask[:, None].to(gate.dtype)
    mixed, after = linear_attention(q, k, v, state, log_gate=gate)
    out, den = divided(mixed, eps)
    return out if eps is None else out.to(query.dtype), den, after
