"""Compute attention by an activation on the scores: `o_i = g_h sum_j a(s_ij) v_j / d_i`, `s_ij = scaling q_i . k_j`.

O(n^2 d) time whatever the activation; the fast forms need O(n d) memory. Softmax is the activation exp(s - max s);
ReLU over the number of keys is Wortsman et al., "Replacing softmax with ReLU in vision transformers", 2023.
"""

from torch import Tensor, dtype

from ...masks import Mask
from ..backends import Op
from ..spec import Activation

_op = Op(__name__)


def score_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scaling: float,
    activation: Activation,
    *,
    gain: Tensor | None = None,
    result_dtype: dtype | None = None,
) -> Tensor:
    """Return attention whose weights are an activation of the scores: `o_i = g_h sum_j a(s_ij) v_j / d_i`.

    The mask's soft cap and bias change the scores before the activation, in this order; its sinks are one more key
    whose value is zero. Scores and sums are float32 whatever the dtype of the inputs (float64 for float64). O(T S d)
    time; the portable form needs O(n d) memory, with a gradient too.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`. Query heads share key/value heads in
            equal groups.
        mask: which keys each row may attend to.
        scaling: factor of the scores.
        activation: the weights a and the denominator d.
        gain: `[H]`, a factor g of the output of each head; None for 1.
        result_dtype: dtype of the output; that of the query by default.

    Returns:
        `[B, H, T, Dv]`; a row that may attend to nothing is zero.

    Raises:
        NotImplementedError: the backend that HF_ATTNSWAP_BACKEND asks for cannot serve this call.
    """
    return _op(query, key, value, mask, scaling, activation, gain, result_dtype or query.dtype)
