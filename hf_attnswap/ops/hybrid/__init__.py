"""Compute softmax inside a window and linear attention over all that lies before it, under one denominator.

O(n (w d + d F)) time. With W_i the last `window` keys and the first `sinks`, phi the feature maps and g_h a mix per
head,

    o_i = (sum_{j in W_i} e^{s_ij} v_j + g_h sum_{j not in W_i} phi(q_i).phi(k_j) v_j) / (the same sums without v_j).

Zhang et al., "LoLCATs", 2024. There the row maximum is subtracted inside the window only, which gives the linear branch
another scale in every row; here the row maximum is subtracted from both branches, which changes nothing but the range
of the numbers. For the same reason a map that normalises its queries leaves that out here (`FeatureMap.beside`):
beside a softmax the norm would not cancel.

Two options are for texts longer than those of the training. phi may see query and key without their rotation by
position, which softmax goes on seeing: the features then depend on no distance that the maps have not met. And far keys
may fade, by a decay d per key/value head that counts from where a key leaves the window:

    sum_{j not in W_i} d^{i - w - j} phi(q_i).phi(k_j) v_j      (i and j count the tokens that are not padding).
"""

from torch import Tensor

from ...masks import Rotation
from ..backends import Op
from ..sliding import HybridState
from ..spec import FeatureMap

_op = Op(__name__)


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    map_query: FeatureMap,
    map_key: FeatureMap,
    log_mix: Tensor,
    scaling: float,
    *,
    window: int,
    sinks: int,
    valid: Tensor | None = None,
    state: HybridState | None = None,
    keep_state: bool = False,
    rotation: Rotation | None = None,
    log_decay: Tensor | None = None,
) -> tuple[Tensor, HybridState | None]:
    """Return attention by softmax near and by features far away, and what to remember.

    Sums are float32 whatever the dtype of the inputs (float64 for float64). O(T (w + m) D + T F Dv) time per head for
    w = `window` and m = `sinks`; O(n d) memory.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, T, D]`; value: `[B, Hkv, T, Dv]`. Query heads share key/value heads in
            equal groups.
        map_query, map_key: the feature maps, applied to float32 query and key as they are, not scaled.
        log_mix: log of g_h, `[H]`.
        scaling: factor of the scores.
        window: how many of the last tokens softmax covers, the row's token included; padding does not count.
        sinks: how many of the first tokens softmax covers; padding does not count.
        valid: bool `[B, T]`, False at padding; None where there is none.
        state: what is remembered of the tokens before; None at the start of a text.
        keep_state: whether to return what to remember after these tokens.
        rotation: of the T tokens, which is undone before the maps; None where the maps see query and key as they are.
            A state must have been kept with one, or without one, as well.
        log_decay: log d, `[Hkv]`, at least -ln 2; None for d = 1.

    Returns:
        `[B, H, T, Dv]` in the query's dtype, any finite numbers at padding, and the state, None unless `keep_state`.

    Raises:
        NotImplementedError: the backend that HF_ATTNSWAP_BACKEND asks for cannot serve this call.
    """
    return _op(
        query, key, value, map_query, map_key, log_mix, scaling, window, sinks, valid, state, keep_state,
        rotation, log_decay,
    )  # fmt: skip
