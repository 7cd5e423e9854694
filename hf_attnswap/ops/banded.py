"""Write softmax over the window of each row and the first tokens (sinks) as a call of a function of an ONNX graph."""

import torch
from torch import Tensor

from .nodes import DOMAIN
from .sliding import WindowState


def empty_state(key: Tensor, value: Tensor, window: int, sinks: int) -> WindowState:
    """Return the state before the first token, with all its slots, for keys `[B, Hkv, T, D]` and their values."""
    batch, heads = key.shape[:2]
    slots = (t.new_zeros(batch, heads, sinks + window, t.shape[-1]) for t in (key, value))
    return WindowState(*slots, key.new_zeros(batch, dtype=torch.long))


def banded_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int,
    sinks: int,
    valid: Tensor | None,
    state: WindowState | None,
) -> tuple[list[Tensor], WindowState]:
    """Return numerator `[B, H, T, Dv]`, denominator and row maximum `[B, H, T, 1]` of a softmax, and what to remember.

    Takes what `window_attention` takes, with padding only before the first token of a text, and a state with all slots.

    The function, in `export/functions.py`, takes q `[B, Hkv, G, T, D]`, k `[B, Hkv, T, D]` and v `[B, Hkv, T, Dv]`, in
    float32, valid, bool `[B, T]`, and the keys, the values and the count of the state. It returns `sum e^{s - p} v`,
    `[B, Hkv, G, T, Dv]`, `sum e^{s - p}` and p, `[B, Hkv, G, T, 1]`, and the keys and the values to remember.
    """
    (batch, _, length, dim), kv_heads, value_dim = query.shape, key.shape[1], value.shape[-1]
    state = empty_state(key, value, window, sinks) if state is None else state
    valid = query.new_ones(batch, length, dtype=torch.bool) if valid is None else valid
    q, k, v = query.float().unflatten(1, (kv_heads, -1)), key.float(), value.float()
    rows, slots = q.shape[:4], (batch, kv_heads, sinks + window)
    *parts, new_key, new_value = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::BandedSoftmax",
        (q, k, v, valid, state.key, state.value, state.count),
        {"window": window, "sinks": sinks, "scaling": scaling},
        dtypes=[torch.float32] * 5,
        shapes=((*rows, value_dim), (*rows, 1), (*rows, 1), (*slots, dim), (*slots, value_dim)),
        version=1,
    )
    return [t.flatten(1, 2) for t in parts], WindowState(new_key, new_value, state.count + valid.sum(1))
