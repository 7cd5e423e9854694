"""Compute linear attention: `o_i = sum_j (phi(q_i) . phi(k_j)) v_j / (sum_j phi(q_i) . phi(k_j) + eps)`.

O(n d F) time for F features. The causal form goes by chunks of tokens (inside a chunk the masked product, across
chunks the state `S = sum_j phi(k_j) [v_j, 1]^T`) or by the recurrence; O(n d) memory. Katharopoulos et al.,
"Transformers are RNNs", 2020; by chunks as in Hua et al., "Transformer quality in linear time" (FLASH), 2022. It may
have a decay d per key/value head, `S_i = d S_{i-1} + phi(k_i) [v_i, 1]^T`, so that key j counts `d^{i - j}` times in
row i: Sun et al., "Retentive network", 2023. States, denominators and products are float32 whatever the dtype of the
inputs (float64 for float64): a bfloat16 state drifts over long texts.
"""

from torch import Tensor

from ..backends import Op
from ..spec import FeatureMap

_op = Op(__name__)


def causal_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    map_query: FeatureMap,
    map_key: FeatureMap,
    *,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    state: Tensor | None = None,
    eps: float | None = 1e-6,
    chunk: int = 64,
    log_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return linear attention of every query to the keys up to its position, the denominators, and the last state.

    `o_i = phi(q_i) S_i / (phi(q_i) z_i + eps)`, with S_i the sum of `d^{i - j} phi(k_j) v_j^T` and z_i that of
    `d^{i - j} phi(k_j)` over j <= i, d = 1 without a decay. O(T (F Dv + chunk (F + Dv))) time per head; by the
    recurrence O(F Dv) for one token after a state.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, T, D]`; value: `[B, Hkv, T, Dv]`. Query heads share key/value heads in
            equal groups.
        map_query, map_key: the feature maps, applied to float32 slices of the sequence.
        scale: factor of query and key before the maps.
        key_mask: bool `[B, T]`; keys at False leave no trace, and nothing fades there.
        state: over the tokens before, `[B, Hkv, F, Dv + 1]`, a constant to the gradient; None at the start of a text.
        eps: added to the denominator; None returns the numerator undivided.
        chunk: tokens per chunk.
        log_decay: log d, `[Hkv]`, at least -ln 2 (so that powers over a chunk of 64 stay in the range of float32); None
            for d = 1.

    Returns:
        `[B, H, T, Dv]` in the query's dtype (float32 where `eps` is None), the denominator
        `sum_j phi(q_i) . phi(k_j)` as float32 `[B, H, T]`, and the state after the last token, without a gradient.
        For float64 inputs float32 is replaced by float64.

    Raises:
        ValueError: `chunk` is less than 1.
        NotImplementedError: the backend that HF_ATTNSWAP_BACKEND asks for cannot serve this call.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    return _op(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, True, log_decay)


def full_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    map_query: FeatureMap,
    map_key: FeatureMap,
    *,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    eps: float | None = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return linear attention of every query to every key, by two products: O((T + S) F Dv) time per head.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`.
        key_mask: bool `[B, S]`; keys at False leave no trace.
        map_query, map_key, scale, eps: as in `causal_linear`.

    Returns:
        `[B, H, T, Dv]` and the denominator `[B, H, T]`, both in float32 (float64 for float64 inputs).

    Raises:
        NotImplementedError: the backend that HF_ATTNSWAP_BACKEND asks for cannot serve this call.
    """
    return _op(query, key, value, map_query, map_key, scale, key_mask, None, eps, 0, False, None)[:2]
