"""What a row may attend to, in O(n) memory wherever that is possible.

Inside a variant there is one kind of mask: causal, with some keys switched off (`Mask.valid`), or, for variants that
take it, an explicit matrix (`Mask.dense`). All that arrives from a model is brought to that form here, or refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .ops.rows import Tile


@dataclass(frozen=True)
class Mask:
    """Row i of `query_length` rows may attend to key j where `j <= i + key_length - query_length` and `valid[j]`.

    Attributes:
        query_length, key_length: T and S. The queries are the last T of the S positions.
        valid: bool `[B, S]`, or None where every key counts.
        dense: bool `[B, 1 or H, T, S]`, the whole truth where it is not None.
    """

    query_length: int
    key_length: int
    valid: Tensor | None = None
    dense: Tensor | None = None

    @property
    def offset(self) -> int:
        """Position of the first query among the keys."""
        return self.key_length - self.query_length

    def allowed(self, rows: slice, columns: slice, device: torch.device | None = None) -> Tensor:
        """bool, broadcastable to `[B, H, t, s]`, for these rows and columns."""
        if self.dense is not None:
            return self.dense[:, :, rows, columns]
        i = torch.arange(rows.start, rows.stop, device=device) + self.offset
        j = torch.arange(columns.start, columns.stop, device=device)
        allowed = (j[None, :] <= i[:, None])[None, None]
        return allowed if self.valid is None else allowed & self.valid[:, None, None, columns]

    def matrix(self, device: torch.device | None = None) -> Tensor:
        """bool, broadcastable to `[B, H, T, S]`: O(n^2), for references and for softmax itself."""
        return self.allowed(slice(0, self.query_length), slice(0, self.key_length), device)

    def tiles(self, size: int, device: torch.device | None = None) -> Iterator[Tile]:
        """Tiles of `size` rows with the columns that causality leaves them."""
        for start in range(0, self.query_length, size):
            rows = slice(start, min(start + size, self.query_length))
            columns = slice(0, self.key_length if self.dense is not None else self.offset + rows.stop)
            yield Tile(rows, columns, self.allowed(rows, columns, device))

    def new_tokens(self) -> Tensor | None:
        """`valid` of the T queries themselves, bool `[B, T]`, or None."""
        return None if self.valid is None else self.valid[:, self.offset :]

    def __str__(self) -> str:
        if self.dense is not None:
            return f"an explicit {tuple(self.dense.shape)} mask that is not causal with padding"
        return "a causal mask" if self.valid is None else "a causal mask with padding"


@dataclass(frozen=True)
class Packed:
    """Several texts in one row: `segments` int `[B, T]`, 0 for padding, equal numbers for one text."""

    segments: Tensor


_parsed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def parse(attention_mask: Tensor | None, query_length: int, key_length: int) -> Mask | Packed:
    """Bring a mask that a model passes to its attention to the form that variants take.

    Args:
        attention_mask: None (causal); bool `[B, S]` (causal, padding); int `[B, S]` (causal, packed segments);
            bool or additive float `[B, 1 or H, T, S]`.

    Raises:
        NotImplementedError: an additive mask that is a bias rather than a mask.
        ValueError: a mask of another shape.
    """
    if attention_mask is None:
        return Mask(query_length, key_length)
    if attention_mask.dim() == 2:
        attention_mask = attention_mask[:, :key_length]
        if attention_mask.dtype == torch.bool:
            return Mask(query_length, key_length, valid=attention_mask)
        return Packed(attention_mask)
    if attention_mask.dim() != 4:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; expected 2 or 4 dimensions")
    # All layers of one forward pass receive the same tensor: look at its n x n entries once.
    version = 0 if attention_mask.is_inference() else attention_mask._version
    known, parsed = _parsed.get(attention_mask, (None, None))
    if known != version:
        parsed = _parse_matrix(as_bool(attention_mask))
        _parsed[attention_mask] = version, parsed
    if isinstance(parsed, Mask) and (parsed.query_length, parsed.key_length) != (query_length, key_length):
        dense = as_bool(attention_mask)[..., :key_length]
        return Mask(query_length, key_length, dense=dense)
    return parsed


def as_bool(attention_mask: Tensor) -> Tensor:
    """A 4D bool mask from a bool or an additive float one (0 where allowed, very negative where not)."""
    if attention_mask.dtype == torch.bool:
        return attention_mask
    allowed = attention_mask == 0
    lowest = torch.finfo(attention_mask.dtype).min / 2 if attention_mask.is_floating_point() else 0
    if not (allowed | (attention_mask <= lowest)).all():
        raise NotImplementedError(
            "attention_mask adds a bias (values other than 0 and very negative ones) to the scores; "
            "hf_attnswap takes masks that only allow or forbid"
        )
    return allowed


def _parse_matrix(dense: Tensor) -> Mask | Packed:
    """Padding, or packed segments, where that says the same as the matrix for every row that is a valid token."""
    query_length, key_length = dense.shape[-2:]
    explicit = Mask(query_length, key_length, dense=dense)
    if dense.shape[1] != 1 or key_length < query_length:
        return explicit
    if query_length == key_length:
        segments = find_segments(lambda start, stop: dense[:, :, start:stop], key_length)
        return explicit if segments is None else from_segments(segments)
    offset = key_length - query_length
    matrix = dense[:, 0]
    valid = torch.cat([matrix[:, 0, :offset], matrix[:, :, offset:].diagonal(dim1=1, dim2=2)], dim=1)
    candidate = Mask(query_length, key_length, valid=valid)
    if not (candidate.matrix(dense.device)[:, 0] == matrix).all() or not valid[:, offset:].all():
        return explicit
    return Mask(query_length, key_length) if valid.all() else candidate


def from_segments(segments: Tensor) -> Mask | Packed:
    """int `[B, n]` (0: padding) as a plain mask where every row holds one text, else as `Packed`."""
    length, valid = segments.shape[1], segments > 0
    first = torch.where(valid, segments, segments.max() + 1).amin(1, keepdim=True)
    if (valid & (segments != first)).any():
        return Packed(segments)
    return Mask(length, length, valid=None if valid.all() else valid)


def find_segments(rows_of_matrix: Callable[[int, int], Tensor], length: int, block: int = 256) -> Tensor | None:
    """The texts packed into rows, read off a causal mask by blocks of rows: O(n) memory, one look at n^2 entries.

    Args:
        rows_of_matrix: `(start, stop) -> bool [B, 1, stop - start, length]`.

    Returns:
        int32 `[B, length]`: 0 for padding, the same number for the tokens of one text; None where the mask is
        something else than causal attention inside texts. Tokens that do not see themselves are padding, and may attend
        to anything: nobody reads them.
    """
    blocks = [(start, min(start + block, length)) for start in range(0, length, block)]
    columns = []
    for start, stop in blocks:
        rows = rows_of_matrix(start, stop)[:, 0]
        valid = rows.diagonal(offset=start, dim1=1, dim2=2)
        # All tokens of a text see the same first token, and tokens of two texts never do.
        columns.append(torch.where(valid, rows.int().argmax(-1) + 1, 0))
    segments = torch.cat(columns, dim=1).to(torch.int32)
    if not segments.any(dim=1).all():
        return None
    position = torch.arange(length, device=segments.device)
    for start, stop in blocks:
        own = segments[:, start:stop, None]
        expected = (own == segments[:, None, :]) & (position[None, :] <= position[start:stop, None])
        if not ((expected == rows_of_matrix(start, stop)[:, 0]) | (own == 0)).all():
            return None
    return segments
