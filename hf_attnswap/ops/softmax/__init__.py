"""Compute softmax attention: `o_i = sum_j e^{s_ij} v_j / sum_j e^{s_ij}`, `s_ij = scaling q_i . k_j`.

O(n^2 d) time, O(n d) memory. Vaswani et al., "Attention is all you need", 2017.
"""

from torch import Tensor

from ...masks import Mask
from ..backends import Op

_op = Op(__name__)


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float, *, dropout: float = 0.0
) -> Tensor:
    """Return softmax attention, `[B, H, T, Dv]` in the query's dtype; a row that may attend to nothing is no number.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`. Query heads share key/value heads in
            equal groups.
        mask: which keys each row may attend to, with a bias or without; no soft cap and no sinks.
        scaling: factor of the scores.
        dropout: probability of a weight to be dropped.

    Raises:
        NotImplementedError: the backend that HF_ATTNSWAP_BACKEND asks for cannot serve this call.
    """
    return _op(query, key, value, mask, scaling, dropout)
