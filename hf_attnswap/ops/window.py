"""Softmax over a sliding window and the first tokens (sinks): O(n (w + m) d) time, O(n d) memory.

Rows are taken as texts whose valid tokens stand side by side: `Context` moves padding to the end first, so that
"the last w keys" means the last w keys that the row may attend to, wherever the padding was.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .heads import compute_dtype, mix, scores
from .rows import Tile, by_rows, rows_per_tile


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x `[B, H, S, D]`, index `[B, t]` -> `[B, H, t, D]`."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


@dataclass(frozen=True)
class WindowState:
    """What a window layer remembers: the last w keys and values (right-aligned), the first m, and how many came.

    Shapes: `[B, Hkv, w, D]`, `[B, Hkv, w, Dv]`, `[B, Hkv, m, D]`, `[B, Hkv, m, Dv]`, `[B]`.
    """

    recent_key: Tensor
    recent_value: Tensor
    sink_key: Tensor
    sink_value: Tensor
    count: Tensor


class Context:
    """The new tokens of a call behind the w remembered ones, padding moved to the end.

    Attributes:
        query: `[B, H, T, D]`, aligned. key, value: `[B, Hkv, w + T, *]`: slot u holds the token at position
            `count + u - w` of its text (nothing where that is negative).
        sink_key, sink_value: `[B, Hkv, m, *]`: slot j holds position j (meaningful where a row is at j or later).
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        window: int,
        sinks: int,
        state: WindowState | None = None,
    ):
        self.window, self.sinks, self.length = window, sinks, query.shape[2]
        self.order = None if valid is None else torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)
        self.lengths = None if valid is None else valid.sum(1)
        if self.order is not None:
            query, key, value = (_gather(t, self.order) for t in (query, key, value))
        self.query = query
        self.count = None if state is None else state.count
        self.sink_key, self.sink_value = (
            self._sinks(new, None if state is None else old)
            for new, old in ((key, state and state.sink_key), (value, state and state.sink_value))
        )
        if state is None:
            self.key, self.value = (F.pad(t, (0, 0, window, 0)) for t in (key, value))
        else:
            self.key = torch.cat([state.recent_key.to(key.dtype), key], dim=2)
            self.value = torch.cat([state.recent_value.to(value.dtype), value], dim=2)

    def _sinks(self, new: Tensor, old: Tensor | None) -> Tensor:
        if old is None:
            return F.pad(new[:, :, : self.sinks], (0, 0, 0, max(0, self.sinks - new.shape[2])))
        slot = torch.arange(self.sinks, device=new.device)
        source = (slot[None, :] - self.count[:, None]).clamp(0, new.shape[2] - 1)
        return torch.where((slot[None, :] < self.count[:, None])[:, None, :, None], old, _gather(new, source))

    def position(self, slots: slice) -> Tensor:
        """Position in its text of each slot of `key`: `[1 or B, s]`, negative where nothing is."""
        index = torch.arange(slots.start, slots.stop, device=self.query.device)[None] - self.window
        return index if self.count is None else index + self.count[:, None]

    def tiles(self):
        """Tiles of rows over the w slots before them and themselves."""
        size = rows_per_tile(self.query.shape[0], self.query.shape[1], 2 * self.window)
        size = min(size, max(32, self.window))
        for start in range(0, self.length, size):
            rows = slice(start, min(start + size, self.length))
            columns = slice(start + 1, rows.stop + self.window)
            row = torch.arange(rows.start, rows.stop, device=self.query.device)[:, None] + self.window
            slot = torch.arange(columns.start, columns.stop, device=self.query.device)[None, :]
            near = (slot <= row) & (row - slot < self.window)
            yield Tile(rows, columns, near & (self.position(columns) >= self.sinks)[:, None, None, :])

    def sinks_allowed(self, rows: slice) -> Tensor:
        """bool `[1 or B, 1, t, m]`: which sinks are at or before the row."""
        position = self.position(slice(rows.start + self.window, rows.stop + self.window))
        slot = torch.arange(self.sinks, device=self.query.device)
        return (slot <= position[:, :, None])[:, None]

    def unalign(self, rows: Tensor) -> Tensor:
        """`[B, H, T, D]` in the order of the call again."""
        return rows if self.order is None else _gather(rows, torch.argsort(self.order, dim=1))

    def leaving(self) -> tuple[Tensor, Tensor, Tensor]:
        """The token that leaves the window as each row enters: key, value `[B, Hkv, T, *]`, bool `[1 or B, T]`.

        False where no token leaves, where it is a sink, and in the rows of padding at the end.
        """
        slots = slice(0, self.length)
        exists = self.position(slots) >= self.sinks
        if self.lengths is not None:
            exists = exists & (torch.arange(self.length, device=exists.device) < self.lengths[:, None])
        return self.key[:, :, slots], self.value[:, :, slots], exists

    def state(self) -> WindowState:
        """What to remember after these tokens."""
        batch, device = self.query.shape[0], self.query.device
        count = torch.zeros(batch, dtype=torch.long, device=device) if self.count is None else self.count
        if self.lengths is None:
            recent = (self.key[:, :, self.length :], self.value[:, :, self.length :])
            count = count + self.length
        else:
            last = self.lengths[:, None] + torch.arange(self.window, device=device)
            recent = (_gather(self.key, last), _gather(self.value, last))
            count = count + self.lengths
        return WindowState(*(t.contiguous() for t in recent), self.sink_key, self.sink_value, count)


def window_softmax_parts(context: Context, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Numerator `sum e^{s - c} v` `[B, H, T, Dv]`, denominator `sum e^{s - c}` and row maximum c, both `[B, H, T, 1]`.

    Over the last `window` tokens and the first `sinks`; each token counts once. All float32 (or float64), aligned.
    """
    dtype = compute_dtype(context.query.dtype)
    sink_key, sink_value = context.sink_key, context.sink_value

    def attend(query, key, value, tile: Tile):
        query = query.to(dtype) * scaling
        key = torch.cat([sink_parameter[0].to(dtype), key.to(dtype)], dim=2)
        value = torch.cat([sink_parameter[1].to(dtype), value.to(dtype)], dim=2)
        allowed = torch.cat(
            [context.sinks_allowed(tile.rows).expand(tile.allowed.shape[0], -1, -1, -1), tile.allowed], dim=-1
        )
        s = scores(query, key).masked_fill(~allowed, float("-inf"))
        # Rows of padding may see nothing at all; their maximum must not be -inf.
        c = s.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
        e = torch.exp(s - c)
        return mix(e, value), e.sum(-1, keepdim=True), c

    sink_parameter = (sink_key, sink_value)
    return by_rows(attend, context.query, context.key, context.value, context.tiles(), sink_parameter)
