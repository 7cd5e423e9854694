"""Softmax over a sliding window and the first tokens (sinks): O(n (w + m) d) time, O(n d) memory.

Rows are taken as texts whose valid tokens stand side by side: `Context` moves padding to the end first, so that
"the last w keys" means the last w keys that the row may attend to, wherever the padding was.
"""

import math
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
    """What a window layer remembers: the first m keys and values, then the last w (right-aligned), and how many came.

    Shapes: `[B, Hkv, m + w, D]`, `[B, Hkv, m + w, Dv]`, `[B]`.
    """

    key: Tensor
    value: Tensor
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
        self.sink_key, self.key = self._remembered(key, state and state.key)
        self.sink_value, self.value = self._remembered(value, state and state.value)

    def _remembered(self, new: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sinks, those among the new tokens included, and the new tokens behind the last w."""
        if old is None:
            sinks = F.pad(new[:, :, : self.sinks], (0, 0, 0, max(0, self.sinks - new.shape[2])))
            return sinks, F.pad(new, (0, 0, self.window, 0))
        slot = torch.arange(self.sinks, device=new.device)
        source = (slot[None, :] - self.count[:, None]).clamp(0, new.shape[2] - 1)
        known = (slot[None, :] < self.count[:, None])[:, None, :, None]
        sinks = torch.where(known, old[:, :, : self.sinks], _gather(new, source))
        return sinks, torch.cat([old[:, :, self.sinks :].to(new.dtype), new], dim=2)

    def position(self, slots: slice) -> Tensor:
        """Position in its text of each slot of `key`: `[1 or B, s]`, negative where nothing is."""
        index = torch.arange(slots.start, slots.stop, device=self.query.device)[None] - self.window
        return index if self.count is None else index + self.count[:, None]

    def tiles(self):
        """Tiles of rows over the w slots before them and themselves."""
        size = rows_per_tile(self.query.shape[0], self.query.shape[1], 2 * self.window)
        size = min(size, max(32, 2 * self.window))
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
        count = 0 if self.count is None else self.count
        if self.lengths is None:
            recent = (t[:, :, self.length :] for t in (self.key, self.value))
            count = self.query.new_full((self.query.shape[0],), self.length, dtype=torch.long) + count
        else:
            last = self.lengths[:, None] + torch.arange(self.window, device=self.query.device)
            recent = (_gather(t, last) for t in (self.key, self.value))
            count = self.lengths + count
        sinks = (self.sink_key, self.sink_value)
        return WindowState(*(torch.cat(pair, dim=2) for pair in zip(sinks, recent, strict=True)), count)

    def softmax_parts(self, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
        """Numerator `sum e^{s - c} v` `[B, H, T, Dv]`, denominator `sum e^{s - c}` and row maximum c, `[B, H, T, 1]`.

        Over the last `window` tokens and the first `sinks`; each token counts once. Float32 (or float64), aligned.
        """
        dtype = compute_dtype(self.query.dtype)
        sinks = (self.sink_key, self.sink_value)

        def attend(query, key, value, bias, tile: Tile):
            key, value = (
                torch.cat([s.to(dtype), t.to(dtype)], dim=2) for s, t in zip(sinks, (key, value), strict=True)
            )
            early = self.sinks_allowed(tile.rows).expand(tile.allowed.shape[0], -1, -1, -1)
            return _softmax_parts(query.to(dtype), key, value, torch.cat([early, tile.allowed], dim=-1), scaling)

        return by_rows(attend, self.query, self.key, self.value, self.tiles(), sinks)


class Step:
    """One new token after a state, nothing padded: a `Context` of few kernels, for generation."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, sinks: int, state: WindowState):
        self.query, self.sinks, self.old = query, sinks, state
        slots = state.key.shape[2]
        slot = torch.arange(slots, device=query.device)
        count = state.count[:, None]
        # A sink slot is filled from its own position on; a recent slot counts where it holds no sink.
        self.allowed = torch.where(slot < sinks, count >= slot, count + slot >= slots - 1 + sinks)[:, None, None]
        self.key, self.value = (self._push(old, new) for old, new in ((state.key, key), (state.value, value)))

    def _push(self, old: Tensor, new: Tensor) -> Tensor:
        m = self.sinks
        slot = torch.arange(m, device=new.device)
        sinks = torch.where((slot == self.old.count[:, None])[:, None, :, None], new.to(old.dtype), old[:, :, :m])
        return torch.cat([sinks, old[:, :, m + 1 :], new.to(old.dtype)], dim=2)

    def leaving(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `Context.leaving`."""
        slot = slice(self.sinks, self.sinks + 1)
        window = self.key.shape[2] - self.sinks
        return self.old.key[:, :, slot], self.old.value[:, :, slot], self.old.count[:, None] >= window + self.sinks

    def unalign(self, rows: Tensor) -> Tensor:
        return rows

    def state(self) -> WindowState:
        return WindowState(self.key, self.value, self.old.count + 1)

    def softmax_parts(self, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
        """As `Context.softmax_parts`."""
        dtype = compute_dtype(self.query.dtype)
        return _softmax_parts(self.query.to(dtype), self.key.to(dtype), self.value.to(dtype), self.allowed, scaling)


def context(query, key, value, valid, window: int, sinks: int, state: WindowState | None) -> Context | Step:
    """The new tokens of a call with what is remembered, in the form that suits them."""
    if query.shape[2] == 1 and valid is None and state is not None and not torch.is_grad_enabled():
        return Step(query, key, value, sinks, state)
    return Context(query, key, value, valid, window, sinks, state)


_LOG2_E = math.log2(math.e)


def _softmax_parts(query, key, value, allowed, scaling):
    # Powers of two: on a CPU, torch's exp takes twenty times as long for -inf as for other numbers, its exp2 does not.
    s = scores(query * (scaling * _LOG2_E), key)
    learning = torch.is_grad_enabled()  # else nothing needs what is overwritten
    s = s.masked_fill(~allowed, float("-inf")) if learning else s.masked_fill_(~allowed, float("-inf"))
    # Rows of padding may see nothing at all; their maximum must not be -inf.
    c = s.amax(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).min)
    e = torch.exp2(s - c) if learning else s.sub_(c).exp2_()
    return mix(e, value), e.sum(-1, keepdim=True), (c / _LOG2_E).clamp(min=torch.finfo(s.dtype).min)
