"""Write the hybrid as a call of the function BandedSoftmax and a node LinearAttention of an ONNX graph."""

import torch
import torch.nn.functional as F

from ..banded import banded_softmax, empty_state
from ..nodes import linear_attention, unfit  # noqa: F401
from ..sliding import HybridState
from .reference import log_scale
from .torch import _joined


def run(
    query, key, value, map_query, map_key, log_mix, scaling, window, sinks, valid, state, keep_state,
    rotation, log_decay,
):  # fmt: skip
    """Return what `hybrid_attention` returns, the state with all its slots; takes the arguments in order."""
    length, S = query.shape[2], None if state is None else state.linear
    before = empty_state(key, value, window, sinks) if state is None else state.window
    valid = query.new_ones(query.shape[0], length, dtype=torch.bool) if valid is None else valid
    parts, after = banded_softmax(query, key, value, scaling, window, sinks, valid, before)
    # As a row enters the window, the slot w before it leaves.
    x, (leaving_key, leaving_value) = query.float(), (
        torch.cat([old[:, :, sinks:], new.float()], 2)[:, :, :length]
        for old, new in ((before.key, key), (before.value, value))
    )  # fmt: skip
    turns = None
    if rotation is not None:
        turns = key.new_zeros(key.shape[0], 1, window, rotation.turns.shape[-1]) if state is None else state.turns
        turns = torch.cat([turns, rotation.turns[:, None]], 2)
        x, leaving_key = rotation.undo(x), rotation.of(turns[:, 0, :length]).undo(leaving_key)
    position = torch.arange(length, device=key.device) - window + (after.count - length)[:, None]
    features, left_out = map_query.beside_softmax(x)
    k = map_key(leaving_key) * (position >= sinks)[:, None, :, None].to(x.dtype)
    gate = None if log_decay is None else log_decay.float()[:, None] * valid[:, None].to(x.dtype)
    linear, S = linear_attention(features, k, F.pad(leaving_value, (0, 1), value=1.0), S, log_gate=gate)
    out = _joined(*parts, linear, log_scale(x, log_mix, left_out)).to(query.dtype)
    return out, HybridState(after, S, None if turns is None else turns[:, :, -window:]) if keep_state else None
