"""Give each row the keys of its window and the first tokens (sinks), for the ops `window` and `hybrid`.

Rows are taken as texts whose valid tokens stand side by side: `Context` moves padding to the end first, so that
"the last w keys" means the last w keys that the row may attend to, wherever the padding was. In shapes, w is the
window, m the number of sinks.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import blocks, in_large_kernels, product, to_chunks
from .heads import compute_dtype, mix, scores
from .programs import sizes_are_open, whole_chunks
from .rows import Tile, rows_per_tile


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens `index` `[B, t]` of x `[B, H, S, D]`, as `[B, H, t, D]`."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


# Rows of a chunk; it sees its own tokens and the w before them.
CHUNK = 64
# Powers of two: on a CPU, torch's exp takes twenty times as long for -inf as for other numbers, its exp2 does not.
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class WindowState:
    """Hold what a window layer remembers: the first keys and values, then the last (right-aligned), and a count.

    Attributes:
        key: `[B, Hkv, f + r, D]`; value: `[B, Hkv, f + r, Dv]`, for the first f and the last r tokens, padding
            included: m and w, or fewer as long as fewer have come. Slots that no valid token has reached do not count.
        count: int `[B]`, how many valid tokens came before.
    """

    key: Tensor
    value: Tensor
    count: Tensor

    def first(self, window: int, sinks: int) -> int:
        """Return f: of n tokens, there are min(m, n) slots of the first and min(w, n) of the last."""
        slots = self.key.shape[2]
        return min(sinks, max(slots // 2, slots - window))


class HybridState(NamedTuple):
    """Hold what a hybrid layer remembers: the tokens of the window and the sinks, and one sum over all other tokens.

    Attributes:
        window: the tokens near and at the start.
        linear: `sum_j phi(k_j) [v_j, 1]^T` over the keys that have left the window, `[B, Hkv, F, Dv + 1]`; with a
            decay, each as it has faded since then.
        turns: of the r tokens of the window (`Rotation.turns`), `[B, 1, r, 2 P]`, where a map sees them without their
            rotation; None elsewhere.
    """

    window: WindowState
    linear: Tensor
    turns: Tensor | None = None


class Context:
    """Hold the new tokens of a call behind the remembered ones, with padding moved to the end.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, T, D]`; value: `[B, Hkv, T, Dv]`.
        valid: bool `[B, T]`, False at padding; None where there is none.
        window, sinks: w and m, no less than the last and the first tokens that the state holds.
        state: what the last call remembered; None at the start of a text.
        first: f, of the first tokens that the state holds.
        reach: as in `window_attention`.

    Attributes:
        query: `[B, H, T, D]`, aligned: valid tokens first.
        key, value: `[B, Hkv, w + T, *]`; slot u holds the token at position `count + u - w` of its text (nothing where
            that is negative).
        sink_key, sink_value: `[B, Hkv, m, *]`; slot j holds position j (meaningful where a row is at j or later).
        given: T. length: the number of aligned tokens, T or more. window, sinks: w and m.
        open: whether T is open; then `length` is a number of whole chunks.
        chunk: rows per chunk of the banded products, `min(64, w)` but at least 16.
        valid: bool `[B, T]`; None without padding.
        order: int `[B, T]`, the place in the call of each aligned token; None without padding.
        lengths: int `[B]`, valid tokens of each text; None without padding.
        count: int `[B]`, valid tokens before this call; None at the start of a text.
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
        first: int = 0,
        reach: int | None = None,
    ):
        self.window, self.sinks, self.given, self.reach = window, sinks, query.shape[2], reach
        self.chunk = max(16, min(CHUNK, window))
        self.open = sizes_are_open(query)
        if self.open and valid is None:
            valid = query.new_ones(query.shape[0], self.given, dtype=torch.bool)
        self.valid = valid
        if self.open:  # whole chunks, of which those behind the last token are padding
            more = whole_chunks(self.given, self.chunk) * self.chunk - self.given
            valid = F.pad(valid, (0, more))
        self.length = self.given + (more if self.open else 0)
        self.order = None if valid is None else torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)
        self.lengths = None if valid is None else valid.sum(1)
        query, key, value = (self._aligned(t) for t in (query, key, value))
        self.query = query
        self.count = None if state is None else state.count
        self.sink_key, self.key = self._remembered(key, state and state.key, first)
        self.sink_value, self.value = self._remembered(value, state and state.value, first)

    def _remembered(self, new: Tensor, old: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
        """Return the sinks, those among the new tokens included, and the new tokens behind the last w."""
        if old is None:
            sinks = F.pad(new[:, :, : self.sinks], (0, 0, 0, max(0, self.sinks - new.shape[2])))
            return sinks, F.pad(new, (0, 0, self.window, 0))
        slot = torch.arange(self.sinks, device=new.device)
        source = (slot[None, :] - self.count[:, None]).clamp(0, new.shape[2] - 1)
        known = (slot[None, :] < self.count[:, None])[:, None, :, None]
        sinks = torch.where(known, F.pad(old[:, :, :first], (0, 0, 0, self.sinks - first)), _gather(new, source))
        return sinks, self._behind(old[:, :, first:], new)

    def _aligned(self, x: Tensor) -> Tensor:
        """Return `[B, h, T, E]` with padding at the end, and behind it what fills up whole chunks."""
        x = F.pad(x, (0, 0, 0, self.length - self.given)) if self.open else x
        return x if self.order is None else _gather(x, self.order)

    def _behind(self, recent: Tensor, new: Tensor) -> Tensor:
        """Return the slots of the window with the new tokens behind them, `[B, h, w + T, E]`."""
        recent = F.pad(recent.to(new.dtype), (0, 0, self.window - recent.shape[2], 0))
        return torch.cat([recent, new], dim=2)

    def slots(self, new: Tensor, recent: Tensor | None) -> Tensor:
        """Return what else there is of each token, in the slots of `key`, `[B, h, w + T, E]`.

        Args:
            new: of the tokens of this call, `[B, h, T, E]`.
            recent: what `recent` returned at the last call; None at the start of a text.
        """
        new = self._aligned(new)
        return self._behind(new[:, :, :0] if recent is None else recent, new)

    def recent(self, slots: Tensor) -> Tensor:
        """Return of slots `[B, h, w + T, E]` what to remember for the next call, `[B, h, w, E]`."""
        if self.lengths is None:
            return slots[:, :, self.length :].clone()  # not a view of all slots
        last = self.lengths[:, None] + torch.arange(self.window, device=self.query.device)
        return _gather(slots, last)

    def counted(self) -> Tensor:
        """Return which rows hold a valid token, bool `[1 or B, T]`."""
        rows = torch.arange(self.length, device=self.query.device)[None]
        return rows >= 0 if self.lengths is None else rows < self.lengths[:, None]

    def position(self, slots: slice) -> Tensor:
        """Return the position in its text of each slot of `key`, int `[1 or B, s]`, negative where a slot is empty."""
        index = torch.arange(slots.start, slots.stop, device=self.query.device)[None] - self.window
        return index if self.count is None else index + self.count[:, None]

    def bias(self, rows: slice, chunk: int, dtype: torch.dtype) -> Tensor:
        """Return 0 or -inf for the sinks and the slots that a chunk sees.

        Args:
            rows: rows of one tile, in whole chunks. chunk: rows per chunk.
            dtype: of the bias.

        Returns:
            `[1 or c, 1 or B, 1, 1, chunk, m + chunk + w]`.
        """
        row = torch.arange(chunk, device=self.query.device)[:, None]
        slot = torch.arange(chunk + self.window, device=self.query.device)
        near = ((slot > row) & (slot <= row + self.window))[None, None]
        sinks = near.new_ones(1, 1, chunk, self.sinks)
        if self.reach is not None or rows.start < self.window + self.sinks:
            # Sinks are out of reach, or stand in the window; or slots stand before the text.
            position = self.position(slice(rows.start, rows.stop + self.window)).unfold(1, chunk + self.window, chunk)
            near = near & (position >= self.sinks)[:, :, None, :]
            sinks = sinks_seen(position[:, :, self.window :, None], self.sinks, self.reach)
        allowed = torch.cat([sinks, near], dim=-1).transpose(0, 1)
        return torch.zeros(allowed.shape, dtype=dtype, device=row.device).masked_fill_(~allowed, -math.inf)[
            :, :, None, None
        ]

    def unalign(self, rows: Tensor) -> Tensor:
        """Return `[B, H, T, D]` in the order of the call, padding in its place again; rows that see nothing are 0."""
        if self.order is None:
            return rows
        seen = self.valid.cumsum(1) if self.count is None else self.valid.cumsum(1) + self.count[:, None]
        rows = _gather(rows, torch.argsort(self.order, dim=1)[:, : self.given])
        return rows.masked_fill((seen == 0)[:, None, :, None], 0)

    def leaving(self) -> Tensor:
        """Return whether slot u leaves the window as row u enters, bool `[1 or B, T]`.

        False where no token leaves, where the token is a sink, and in the rows of padding at the end.
        """
        exists = self.position(slice(0, self.length)) >= self.sinks
        return exists if self.lengths is None else exists & self.counted()

    def state(self) -> WindowState:
        """Return what to remember after these tokens, for the next call."""
        count = 0 if self.count is None else self.count
        if self.lengths is None:
            count = self.query.new_full((self.query.shape[0],), self.length, dtype=torch.long) + count
        else:
            count = self.lengths + count
        recent = (self.recent(t) for t in (self.key, self.value))
        sinks = (self.sink_key, self.sink_value)
        return WindowState(*(torch.cat(pair, dim=2) for pair in zip(sinks, recent, strict=True)), count)

    def tiles(self) -> list[Tile]:
        """Return blocks of rows in whole chunks; the columns of a tile are its rows and the w slots before them."""
        if self.open:
            return [Tile(slice(0, self.length), slice(0, self.length + self.window), None)]
        batch, heads, _, _ = self.query.shape
        most = rows_per_tile(batch, heads, self.sinks + self.chunk + self.window)
        rows = blocks(self.length, self.chunk, most)
        return [Tile(part, slice(part.start, part.stop + self.window), None) for part in rows]

    def softmax_parts(
        self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return numerator `sum e^{s - c} v`, denominator `sum e^{s - c}` and row maximum c of one tile.

        The sums go over the last `window` tokens and the first `sinks`; each token counts once. O(t (w + m) d) time for
        the t rows of the tile.

        Args:
            query: `[B, H, t, D]`; key: `[B, Hkv, t + w, D]`; value: `[B, Hkv, t + w, Dv]`.
            tile: of `tiles`. scaling: factor of the scores.

        Returns:
            `[c, B Hkv, G chunk, Dv]` and twice `[c, B Hkv, G chunk, 1]`, in `compute_dtype`. The row maximum is a
            constant to the gradient.
        """
        batch, dtype, size = query.shape[0], compute_dtype(query.dtype), self.chunk_of(query)

        def columns(sinks: Tensor, slots: Tensor) -> Tensor:
            """Return what each chunk sees, `[c, B Hkv, D, m + chunk + w]`."""
            slots = slots.to(dtype).unfold(2, size + self.window, size).permute(2, 0, 1, 3, 4)
            sinks = sinks.to(dtype).mT.expand(slots.shape[0], -1, -1, -1, -1)
            return torch.cat([sinks, slots], dim=-1).flatten(1, 2)

        # The factor goes to the keys: there are fewer of them, in groups.
        key, sink_key = (t.to(dtype) * (scaling * _LOG2_E) for t in (key, self.sink_key))
        s = product(to_chunks(query.to(dtype), key.shape[1], size), columns(sink_key, key))
        s.view(s.shape[0], batch, key.shape[1], -1, size, s.shape[-1]).add_(self.bias(tile.rows, size, dtype))
        e, c = _exponentials(s)
        return product(e, columns(self.sink_value, value).mT), e.sum(-1, keepdim=True), c

    def chunk_of(self, rows: Tensor) -> int:
        """Return the rows per chunk in a tile of rows `[B, H, t, D]`."""
        return self.chunk if self.open else min(self.chunk, rows.shape[2])


class Step:
    """Hold one new token after a state, without padding: a `Context` of few kernels, for generation without a gradient.

    Attributes:
        key, value: `[B, Hkv, m + r, *]`, the slots of the state with the new token at the end; one slot more than the
            state has where the window is larger than the text.
        grows: whether there is such a slot, so that no token leaves the window.
        full: True where all slots are known to be taken (looked up on a CPU only), so that no score has to be masked.
        allowed: bool `[B, 1, 1, m + r]`, the slots that count; set only where `full` is False.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int, state: WindowState, reach: int | None
    ):
        self.query, self.sinks, self.old = query, sinks, state
        self.grows = state.key.shape[2] < sinks + window
        slots = state.key.shape[2] + self.grows
        # Where all slots are taken there is less to do; elsewhere than on the CPU it would take long to look.
        looked = reach is None and not in_large_kernels(query) and not self.grows
        self.full = looked and bool((state.count >= slots).all())
        if not self.full:
            slot = torch.arange(slots, device=query.device)
            count = state.count[:, None]
            # A sink slot is filled from its own position on; a recent slot counts where it holds no sink.
            recent = count + slot >= slots - 1 + sinks
            self.allowed = torch.where(slot < sinks, sinks_seen(count, slots, reach), recent)[:, None, None]
        self.key, self.value = (self._push(old, new) for old, new in ((state.key, key), (state.value, value)))

    def _push(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the slots with the new token at the end, and among the sinks where its position is one of a sink."""
        sinks, new = old[:, :, : self.sinks], new.to(old.dtype)
        if not self.full:
            slot = torch.arange(self.sinks, device=new.device)
            sinks = torch.where((slot == self.old.count[:, None])[:, None, :, None], new, sinks)
        return torch.cat([sinks, old[:, :, self.sinks + (not self.grows) :], new], dim=2)

    def leaving(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the token that leaves the window, and whether one leaves.

        Returns:
            Key and value `[B, Hkv, 1, *]`, and bool `[B, 1]`, False where no token leaves; None in place of the bool
            tensor where a token leaves in every row.
        """
        slot = slice(self.sinks, self.sinks + 1)
        leaves = None if self.full else (self.old.count[:, None] >= self.key.shape[2]) & (not self.grows)
        return self.old.key[:, :, slot], self.old.value[:, :, slot], leaves

    def slots(self, new: Tensor, recent: Tensor) -> Tensor:
        """Return what else there is of each token, `[B, h, r + 1, E]`: the oldest, which may leave, first.

        Takes what `Context.slots` takes.
        """
        recent = F.pad(recent, (0, 0, self.old.key.shape[2] - self.sinks - recent.shape[2], 0))
        return torch.cat([recent, new.to(recent.dtype)], dim=2)

    def recent(self, slots: Tensor) -> Tensor:
        """Return of `slots` what to remember for the next call, `[B, h, r, E]`."""
        return slots if self.grows else slots[:, :, 1:].clone()

    def state(self) -> WindowState:
        """Return what to remember after this token, for the next call."""
        return WindowState(self.key, self.value, self.old.count + 1)

    def softmax_parts(self, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return numerator, denominator and row maximum as `Context.softmax_parts` does, over `[B, H, 1, *]`.

        Args:
            scaling: factor of the scores.
        """
        dtype = compute_dtype(self.query.dtype)
        s = scores(self.query.to(dtype) * (scaling * _LOG2_E), self.key.to(dtype))
        e, c = _exponentials(s if self.full else s.masked_fill_(~self.allowed, -math.inf))
        return mix(e, self.value.to(dtype)), e.sum(-1, keepdim=True), c


def sinks_seen(position: Tensor, sinks: int, reach: int | None) -> Tensor:
    """Return whether a row sees each of the first `sinks` tokens, bool `[..., m]`.

    Args:
        position: of the rows in their texts, `[..., 1]`.
        reach: how many tokens a row may see at most, its own included; None for all.
    """
    since = position - torch.arange(sinks, device=position.device)
    return since >= 0 if reach is None else (since >= 0) & (since < reach)


def context(
    query,
    key,
    value,
    valid,
    window: int,
    sinks: int,
    state: WindowState | None,
    reach: int | None = None,
) -> Context | Step:
    """Return the new tokens of a call together with what is remembered, as a `Step` or a `Context`.

    `Step` for one token after a state that holds all sinks, without padding and without a gradient, `Context`
    otherwise.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, T, D]`; value: `[B, Hkv, T, Dv]`.
        valid: bool `[B, T]`, False at padding; None where there is none.
        window, sinks: w and m.
        state: what the last call remembered; None at the start of a text.
        reach: as in `window_attention`.
    """
    if torch.compiler.is_compiling():  # one program for all lengths
        state = state and _whole(state, window, sinks)
    first = 0 if state is None else state.first(window, sinks)
    if query.shape[2] == 1 and valid is None and state is not None and not torch.is_grad_enabled() and first == sinks:
        return Step(query, key, value, window, sinks, state, reach)
    if not torch.compiler.is_compiling():
        # A row sees no more than the tokens that have come, and there may be more sinks, or a wider window.
        window = min(window, query.shape[2] + (0 if state is None else state.key.shape[2] - first))
        sinks = min(sinks, query.shape[2] + first)
    return Context(query, key, value, valid, window, sinks, state, first, reach)


def _whole(state: WindowState, window: int, sinks: int) -> WindowState:
    """Return the state with a slot for every sink and every token of the window; those that are added hold no token."""
    first = state.first(window, sinks)

    def grown(slots: Tensor) -> Tensor:
        recent = F.pad(slots[:, :, first:], (0, 0, window - slots.shape[2] + first, 0))
        return torch.cat([F.pad(slots[:, :, :first], (0, 0, 0, sinks - first)), recent], dim=2)

    return WindowState(grown(state.key), grown(state.value), state.count)


def _exponentials(s: Tensor) -> tuple[Tensor, Tensor]:
    """Return `e^{s - c}` of scores times log2(e), written over the scores, and their row maximum c, `[..., 1]`.

    c is a constant to the gradient: what is made of numerators and denominators does not depend on c.
    """
    # Rows of padding may see nothing at all; their maximum must not be -inf.
    lowest = torch.finfo(s.dtype).min
    c = s.detach().amax(-1, keepdim=True).clamp(min=lowest)
    return s.sub_(c).exp2_(), (c / _LOG2_E).clamp(min=lowest)
