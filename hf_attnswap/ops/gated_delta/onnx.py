"""Write the gated delta rule as the node LinearAttention of ONNX, which onnxruntime computes."""

from ..nodes import linear_attention, unfit  # noqa: F401


def run(query, key, value, beta, log_gate, state, chunk):
    """Return what `causal_gated_delta` returns; takes its arguments in order."""
    given = (t.float() for t in (query, key, value))
    out, after = linear_attention(*given, state, log_gate=log_gate.float(), beta=beta.float())
    return out.to(query.dtype), after
