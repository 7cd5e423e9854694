"""Compute softmax attention over a sliding window and the first tokens (sinks): O(n (w + m) d) time, O(n d) memory.

Beltagy et al., "Longformer", 2020; Xiao et al., "Efficient streaming language models with attention sinks", 2023.
"""

from torch import Tensor

from ..backends import Op
from ..sliding import WindowState

_op = Op(__name__)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    *,
    window: int,
    sinks: int,
    valid: Tensor | None = None,
    state: WindowState | None = None,
    keep_state: bool = False,
    reach: int | None = None,
) -> tuple[Tensor, WindowState | None]:
    """Return softmax attention to the last `window` keys and the first `sinks`, and what to remember.

    `o_i = sum_{j in W_i} e^{s_ij} v_j / sum_{j in W_i} e^{s_ij}` with `s_ij = scaling q_i . k_j`. Sums are float32
    whatever the dtype of the inputs (float64 for float64). O(T (w + m) D) time per head; O(n d) memory.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, T, D]`; value: `[B, Hkv, T, Dv]`. Query heads share key/value heads in
            equal groups.
        scaling: factor of the scores.
        window: how many of the last tokens each row sees, the row's token included; padding does not count.
        sinks: how many of the first tokens each row sees; padding does not count.
        valid: bool `[B, T]`, False at padding; None where there is none.
        state: what is remembered of the tokens before; None at the start of a text.
        keep_state: whether to return what to remember after these tokens.
        reach: how many of the last tokens a row may see at most, beyond which it sees no sink either, where that is
            more than `window`; None for all. The padding of a text must not stand between its tokens.

    Returns:
        `[B, H, T, Dv]` in the query's dtype, any finite numbers at padding, and the state, None unless `keep_state`.

    Raises:
        NotImplementedError: the backend that HF_ATTNSWAP_BACKEND asks for cannot serve this call.
    """
    return _op(query, key, value, scaling, window, sinks, valid, state, keep_state, reach)
