"""What a row may attend to, in O(n) memory wherever that is possible.

A variant knows one kind of mask: causal or not, with some keys switched off (`Mask.valid`), or, where the variant takes
it, an explicit matrix (`Mask.dense`). Several texts in one row are `Packed`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .rotation import Rotation


class Tile(NamedTuple):
    """Describe some query rows, the slice of keys that they may see, and which of those keys.

    All rows see the first `free` of the columns; `allowed` is about the others, bool, broadcastable to
    `[B, H, t, s - free]`, or None where `attend` knows it.
    """

    rows: slice
    columns: slice
    allowed: Tensor | None
    free: int = 0

    def count(self) -> Tensor:
        """Return how many keys each row may attend to, broadcastable to `[B, H, t, 1]`."""
        return (self.allowed.sum(-1, keepdim=True) + self.free).clamp(min=1)


class Room(NamedTuple):
    """Say where one new token stands among the tokens of a cache of one size, and which of these it may attend to.

    Attributes:
        at: the place of the new token, int `[1]`.
        allowed: bool `[B, n]` for the n tokens that the cache has room for, the new one included.
    """

    at: Tensor
    allowed: Tensor


@dataclass(frozen=True)
class Mask:
    """Say which of S keys each of T rows may attend to, and all else that a call says beside query, key and value.

    Causal: row i may attend to key j where `j <= i + key_length - query_length` and `valid[j]`, and with a sliding
    window W where `j > i + key_length - query_length - W` as well. Otherwise (bidirectional, or cross-attention): to
    every key where `valid[j]`.

    Attributes:
        query_length, key_length: T and S. In causal attention the queries are the last T of the S positions.
        valid: bool `[B, S]`, or None where every key counts.
        dense: bool `[B, 1 or H, T, S]`, the whole truth where it is not None.
        causal: whether keys after the row are forbidden.
        bias: added to the scores, float `[1 or B, 1 or H, T, S]`.
        softcap: c in `c tanh(s / c)`, applied to the scores before the bias.
        sinks: `[H]`, the score of one more key whose value is zero.
        rotation: of the tokens whose queries and keys the call gives, for variants that undo it; None where there is
            none, or nothing that would undo it.
        window: W, the sliding window of the layer, whose padding stands at the ends of a text; None for none.
        before: int `[B]`, how many tokens of each text, padding left out, stand before the first of the S keys, where
            there is a sliding window; None for none.
        room: of the one token of a call whose layer has a cache of one size; all else is then told of this token alone,
            and variants that keep keys themselves go by `room`. None elsewhere.
    """

    query_length: int
    key_length: int
    valid: Tensor | None = None
    dense: Tensor | None = None
    causal: bool = True
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    rotation: Rotation | None = None
    window: int | None = None
    before: Tensor | None = None
    room: Room | None = None

    @property
    def offset(self) -> int:
        """Return the position of the first query among the keys."""
        return self.key_length - self.query_length

    @property
    def plain(self) -> bool:
        """Return whether causality and padding say all, so that nothing has to be known of single scores."""
        return all(part is None for part in (self.dense, self.bias, self.softcap, self.sinks, self.window))

    def without_window(self) -> "Mask":
        """Return the mask of a layer that has no sliding window."""
        return replace(self, window=None, before=None)

    def allowed(self, rows: slice, columns: slice, device: torch.device | None = None) -> Tensor:
        """Return what these rows may see of these columns, bool, broadcastable to `[B, H, t, s]`."""
        if self.dense is not None:
            return self.dense[:, :, rows, columns]
        j = torch.arange(columns.start, columns.stop, device=device)
        if self.causal:
            i = torch.arange(rows.start, rows.stop, device=device) + self.offset
            allowed = (j[None, :] <= i[:, None])[None, None]
            if self.window is not None:
                allowed = allowed & (j[None, :] > i[:, None] - self.window)
        else:
            allowed = torch.ones_like(j, dtype=torch.bool)[None, None, None]
        return allowed if self.valid is None else allowed & self.valid[:, None, None, columns]

    def matrix(self, device: torch.device | None = None) -> Tensor:
        """Return the whole mask, bool, broadcastable to `[B, H, T, S]`: O(n^2), for references and softmax."""
        return self.allowed(slice(0, self.query_length), slice(0, self.key_length), device)

    def tiles(self, size: int, device: torch.device | None = None) -> Iterator[Tile]:
        """Yield tiles of `size` rows with the columns that causality leaves them."""
        triangle = self.causal and self.dense is None
        for start in range(0, self.query_length, size):
            rows = slice(start, min(start + size, self.query_length))
            columns = slice(0, self.offset + rows.stop if triangle else self.key_length)
            free = 0
            if self.dense is None and self.valid is None and self.window is None:
                free = self.offset + rows.start if self.causal else self.key_length
            yield Tile(rows, columns, self.allowed(rows, slice(free, columns.stop), device), free)

    def places(self, device: torch.device | None = None) -> Tensor | None:
        """Return the place of each key in its text, from 1, int `[1 or B, 1, 1, S]`; None without a sliding window."""
        if self.window is None:
            return None
        valid = torch.ones(1, self.key_length, dtype=torch.bool, device=device) if self.valid is None else self.valid
        places = valid.long().cumsum(-1)
        return (places if self.before is None else places + self.before[:, None])[:, None, None]

    def unrotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return query and key as they were before their rotation, in float32 or wider; as they are without one."""
        if self.rotation is None:
            return query, key
        of_queries = self.rotation.tokens(slice(key.shape[2] - query.shape[2], None))
        return of_queries.undo(query), self.rotation.undo(key)

    def new_tokens(self) -> Tensor | None:
        """Return which of the T queries are valid, bool `[B, T]`; None where all are, or keys tell nothing."""
        if self.valid is None or not self.causal and self.offset:
            return None
        return self.valid[:, self.offset :]

    def for_heads(self, take: Callable[[Tensor], Tensor]) -> "Mask":
        """Return the mask of some heads.

        Args:
            take: returns the entries of these heads of `[..., H, ...]`, the heads at dimension 1.
        """
        dense, bias = (t if t is None or t.shape[1] == 1 else take(t) for t in (self.dense, self.bias))
        sinks = None if self.sinks is None else take(self.sinks[None])[0]
        return replace(self, dense=dense, bias=bias, sinks=sinks)

    def __str__(self) -> str:
        if self.bias is not None:
            return f"a bias of shape {tuple(self.bias.shape)} on the scores"
        if self.softcap is not None:
            return f"a soft cap of {self.softcap} on the scores"
        if self.sinks is not None:
            return "learned sinks beside the scores"
        if self.dense is not None:
            return f"an explicit {tuple(self.dense.shape)} mask that is neither causal nor bidirectional with padding"
        direction = "causal" if self.causal else "bidirectional"
        direction = direction if self.window is None else f"sliding {direction}"
        return f"a {direction} mask" if self.valid is None else f"a {direction} mask with padding"


@dataclass(frozen=True)
class Packed:
    """Say that a row holds several texts: `segments` int `[B, T]`, 0 for padding, equal numbers for one text.

    `causal`, `rotation` and `window` are as in `Mask`.
    """

    segments: Tensor
    causal: bool = True
    rotation: Rotation | None = None
    window: int | None = None
