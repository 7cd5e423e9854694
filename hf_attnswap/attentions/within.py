"""Attend within the sliding window of a layer, where a state could not let go of a key: O(n W) time, O(n d) memory.

A sum over all keys so far is no sum over the last W, and the difference of two such sums loses digits. So each row
takes its weights from their definition, over the W keys that it may see, as softmax does in such a layer; what is
remembered are the last W - 1 keys and values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import Mask, Rotation, Tile
from ..ops.heads import compute_dtype
from ..ops.rows import by_rows, rows_per_tile
from .base import Attention


def within_window(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float, state: dict | None
) -> Tensor:
    """Return what `attention` gives in a layer with a sliding window, `[B, H, T, Dv]` in the query's dtype.

    Row i is that of the definition (`Attention.weights`) over the keys i - W + 1 to i.

    Args:
        mask: causal, with a `window`.
        state: of the last r tokens, padding included, "key" `[B, Hkv, r, D]`, "value" `[B, Hkv, r, Dv]`, "valid" bool
            `[B, r]`, and "turns" `[B, r, 2 P]` where there is a rotation; "before", int `[B]`, how many valid tokens
            came before these. Empty at the start of a text, None where no tokens are to come.
    """
    rotation, start = mask.rotation, not state
    turns = None if rotation is None else rotation.turns.expand(query.shape[0], -1, -1)
    valid = mask.new_tokens()
    if valid is None:
        valid = query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool)
    before = query.new_zeros(query.shape[0], dtype=torch.long)
    if state:
        key, value = torch.cat([state["key"], key], 2), torch.cat([state["value"], value], 2)
        valid, before = torch.cat([state["valid"], valid], 1), state["before"]
        turns = None if turns is None else torch.cat([state["turns"], turns], 1)
    if start and query.shape[2] <= mask.window:
        out = attention(query, key, value, mask.without_window(), scaling)
    else:
        rotation = None if rotation is None else rotation.of(turns)
        out = _by_rows(attention, query, key, value, valid, before, rotation, mask.window, scaling)
    if state is not None:
        gone = max(0, key.shape[2] - mask.window + 1)
        state.update(key=key[:, :, gone:].clone(), value=value[:, :, gone:].clone(), valid=valid[:, gone:].clone())
        state["before"] = before + valid[:, :gone].sum(1)
        if turns is not None:
            state["turns"] = turns[:, gone:].clone()
    return out


def _by_rows(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    before: Tensor,
    rotation: Rotation | None,
    window: int,
    scaling: float,
) -> Tensor:
    """Return the output of the last T of S tokens by blocks of rows, each over the W keys before its rows end.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`; valid: bool `[B, S]`.
        before: int `[B]`, valid tokens before the first of the S keys. rotation: of the S tokens.
    """
    (batch, heads, new, _), length = query.shape, key.shape[2]
    places = F.pad(valid.long().cumsum(1), (1, 0)) + before[:, None]

    def attend(query, key, value, bias, tile, carry):
        """Return the output of one tile, `[B, H, t, Dv]`."""
        columns, dtype = tile.columns, query.dtype
        mask = Mask(
            query.shape[2],
            key.shape[2],
            valid[:, columns],
            rotation=None if rotation is None else rotation.tokens(columns),
            window=window,
            before=places[:, columns.start],
        )
        query, key, value = (t.to(compute_dtype(dtype)) for t in (query, key, value))
        return (attention.reference(query, key, value, mask, scaling).to(dtype),), None

    rows = rows_per_tile(batch, heads, min(window, length))
    tiles = []
    for start in range(0, new, rows):
        stop = min(start + rows, new)
        first = max(0, length - new + start - window + 1)
        tiles.append(Tile(slice(start, stop), slice(first, length - new + stop), None))
    (out,), _ = by_rows(attend, query, key, value, tiles, tuple(attention.parameters()))
    return out
