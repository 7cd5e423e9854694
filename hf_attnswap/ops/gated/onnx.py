"""Write the gated recurrence as the node LinearAttention of ONNX, which onnxruntime computes."""

import torch.nn.functional as F

from ..nodes import linear_attention, unfit  # noqa: F401
from ..states import divided


def run(query, key, value, log_gate, state, eps, chunk):
    """Return what `causal_gated` returns; takes its arguments in order."""
    q, k, gate = (t.float() for t in (query, key, log_gate))
    mixed, after = linear_attention(q, k, F.pad(value.float(), (0, 1), value=1.0), state, log_gate=gate)
    out, den = divided(mixed, eps)
    return out if eps is None else out.to(query.dtype), den, after
