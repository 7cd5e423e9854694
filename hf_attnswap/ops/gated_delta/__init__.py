"""Compute attention by the gated delta rule: each token fades the state, and overwrites what it holds for its key.

`S_i = g_i S_{i-1} (I - beta_i k_i k_i^T) + beta_i v_i k_i^T`, `o_i = S_i q_i`, in O(n d dv) time: Yang et al., "Gated
delta networks: improving Mamba2 with delta rule", 2024. g = 1 is `causal_delta`. Keys of norm at most 1, and beta and g
in [0, 1], keep the state in bounds. States and products are float32 whatever the dtype of the inputs (float64 for
float64); O(n d) memory.
"""

from torch import Tensor

from ..backends import Op

_op = Op(__name__)


def causal_gated_delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_gate: Tensor,
    *,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Return `o_i = S_i q_i` and the state after the last token.

    O(T (D Dv + chunk (D + Dv))) time per head; by the recurrence O(D Dv) for one token after a state.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, T, D]`, both with the feature map applied; value: `[B, Hkv, T, Dv]`. Query
            heads share the states in equal groups.
        beta: `[B, Hkv, T]` in [0, 1]; log_gate: log g, `[B, Hkv, T]`, at most 0. A token with beta 0 and log_gate 0
            leaves the state as it is.
        state: over the tokens before, transposed, `[B, Hkv, D, Dv]`, a constant to the gradient; None at the start of
            a text.
        chunk: tokens per chunk.

    Returns:
        `[B, H, T, Dv]` in the query's dtype, and the state after the last token, transposed, in float32 (float64 for
        float64 inputs), without a gradient.

    Raises:
        ValueError: `chunk` is less than 1.
        NotImplementedError: the backend that HF_ATTNSWAP_BACKEND asks for cannot serve this call.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    return _op(query, key, value, beta, log_gate, state, chunk)
