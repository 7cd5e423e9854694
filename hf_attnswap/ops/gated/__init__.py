"""Compute causal linear attention that forgets: `S_i = g_i S_{i-1} + k_i [v_i, 1]^T`, `o_i = q_i S_i`.

O(n d F) time. One gate g in [0, 1] per token and key/value head: Yang et al., "Gated linear attention transformers",
2024, with a scalar gate. A constant gate is the decay of Sun et al., "Retentive network", 2023, and g = 1 is
`causal_linear`. States, denominators and products are float32 whatever the dtype of the inputs (float64 for float64);
O(n d) memory.
"""

from torch import Tensor

from ..backends import Op

_op = Op(__name__)


def causal_gated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    *,
    state: Tensor | None = None,
    eps: float | None = 1e-6,
    chunk: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `o_i = q_i S_i / (q_i z_i + eps)`, the denominators, and the state after the last token.

    z_i is the last column of the state, the gated sum of keys. O(T (F Dv + chunk (F + Dv))) time per head; by the
    recurrence O(F Dv) for one token after a state.

    Args:
        query: features `[B, H, T, F]`; key: features `[B, Hkv, T, F]`; value: `[B, Hkv, T, Dv]`. Query heads share the
            states in equal groups.
        log_gate: `[B, Hkv, T]`, at most 0. A token with key 0 and log_gate 0 leaves the state as it is.
        state: over the tokens before, `[B, Hkv, F, Dv + 1]`, a constant to the gradient; None at the start of a text.
        eps: added to the denominator; None returns the numerator undivided.
        chunk: tokens per chunk.

    Returns:
        `[B, H, T, Dv]` in the query's dtype (float32 where `eps` is None), the denominator `q_i z_i` as float32
        `[B, H, T]`, and the state after the last token, without a gradient. For float64 inputs float32 is replaced by
        float64.

    Raises:
        ValueError: `chunk` is less than 1.
        NotImplementedError: the backend that HF_ATTNSWAP_BACKEND asks for cannot serve this call.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    return _op(query, key, value, log_gate, state, eps, chunk)
