"""Compute attention by the delta rule: each token overwrites the value that a state holds for its key.

`S_i = S_{i-1} (I - beta_i k_i k_i^T) + beta_i v_i k_i^T`, `o_i = S_i q_i`, in O(n d dv) time: Schlag et al., "Linear
transformers are secretly fast weight programmers", 2021; by chunks as in Yang et al., "Parallelizing linear
transformers with the delta rule over sequence length", 2024. Keys of norm at most 1 and beta in [0, 1] keep the state
in bounds. States and products are float32 whatever the dtype of the inputs (float64 for float64); O(n d) memory.
"""

from torch import Tensor

from ..backends import Op

_op = Op(__name__)


def causal_delta(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, *, state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Return `o_i = S_i q_i` and the state after the last token.

    O(T (D Dv + chunk (D + Dv))) time per head; by the recurrence O(D Dv) for one token after a state.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, T, D]`, both with the feature map applied; value: `[B, Hkv, T, Dv]`. Query
            heads share the states in equal groups.
        beta: `[B, Hkv, T]` in [0, 1]. A token with beta 0 leaves the state as it is.
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
    return _op(query, key, value, beta, state, chunk)
