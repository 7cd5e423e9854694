"""Bring every mask that a model passes to its attention to the one form that variants take."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .mask import Mask, Packed


def values_are_hidden() -> bool:
    """Return whether a program is made of this call (torch.compile, torch.export, torch.jit.trace, torch.func, a graph
    of CUDA).

    What is true of the entries of a mask now would become part of the program: they must not be looked at. Under
    torch.func.vmap they are those of many calls.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


_parsed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def parse(
    attention_mask: Tensor | None,
    query_length: int,
    key_length: int,
    causal: bool = True,
    longer: bool = False,
    window: int | None = None,
    asker: object = None,
) -> Mask | Packed:
    """Bring a mask that a model passes to its attention to the form that variants take.

    Args:
        attention_mask: None (nothing forbidden but the future, where `causal`); bool `[B, S]` (causal, padding);
            int `[B, S]` (causal, packed segments); bool `[B, 1, 1, S]` (bidirectional, padding); bool or additive float
            `[B, 1 or H, T, S]`.
        causal: what holds where the mask leaves it open: where it is None or has one row for one query.
        longer: whether the mask may have more columns than S, of which the first S are read: those of a cache that has
            one size from the start.
        window: the sliding window W of the layer, where the mask may have the last T + W - 1 columns alone, those of a
            cache that keeps no more, and where what comes back is to have a `window` in place of a matrix. Of what
            stands before the last T + W - 1 keys, the mask tells nothing; it comes back as valid.
        asker: who asks, such as an attention module. One that asks again about the same tensor is in another call, and
            the tensor is read again: whoever writes on `tensor.data` changes it unseen.

    Raises:
        ValueError: a mask of another shape, or with NaN.
    """
    if attention_mask is None:
        return Mask(query_length, key_length, causal=causal)
    shape = tuple(attention_mask.shape)
    if len(shape) not in (2, 4):
        raise ValueError(f"attention_mask has shape {shape}; expected 2 or 4 dimensions")
    slid = window is not None and len(shape) == 4 and query_length + window - 1 <= shape[-1] < key_length
    if not slid and shape[-1] < key_length or shape[-1] > key_length and not longer:
        raise ValueError(f"attention_mask has shape {shape}, and there are {key_length} keys; expected one column each")
    if len(shape) == 4 and shape[2] not in (1, query_length):
        raise ValueError(f"attention_mask has shape {shape}, and there are {query_length} queries; expected a row each")
    causal = causal and query_length == 1
    call = (query_length, key_length, causal, window)
    if values_are_hidden() or not _changes_are_counted(attention_mask):
        return _parse(attention_mask, *call)
    # All layers of one forward pass receive the same tensor: look at its entries once for each kind of layer.
    version, parsed, askers = _parsed.get(attention_mask, (None, {}, set()))
    if version != attention_mask._version or id(asker) in askers:
        parsed, askers = {}, set()
        _parsed[attention_mask] = attention_mask._version, parsed, askers
    if asker is not None:
        askers.add(id(asker))
    if call not in parsed:
        parsed[call] = _parse(attention_mask, *call)
    return parsed[call]


def _changes_are_counted(tensor: Tensor) -> bool:
    """Return whether the version of a tensor tells that it was changed in place.

    Tensors of inference mode have no version, and who owns the memory of a foreign tensor (numpy) changes it unseen.
    """
    return not tensor.is_inference() and tensor.untyped_storage().resizable()


def _parse(
    attention_mask: Tensor, query_length: int, key_length: int, causal: bool, window: int | None
) -> Mask | Packed:
    if attention_mask.shape[-1] < key_length:  # of a cache that keeps no more than the window
        hidden = False if attention_mask.dtype == torch.bool else torch.finfo(attention_mask.dtype).min
        attention_mask = F.pad(attention_mask, (key_length - attention_mask.shape[-1], 0), value=hidden)
    attention_mask = attention_mask[..., :key_length]
    if attention_mask.dim() == 2:
        if attention_mask.dtype != torch.bool:
            return Packed(attention_mask)
        # A copy: caches remember it, and the caller may write on.
        return Mask(query_length, key_length, valid=None if _all(attention_mask) else attention_mask.clone())
    dense, bias = split(attention_mask)
    dense = dense.expand(-1, -1, query_length, -1)
    slides = window is not None and bias is None and dense.shape[1] == 1 and not values_are_hidden()
    parsed = parse_sliding(dense[:, 0], window) if slides and window < key_length else None
    parsed = _parse_matrix(dense, causal) if parsed is None else parsed
    if slides and isinstance(parsed, Mask) and parsed.dense is not None:
        parsed = parse_sliding(dense[:, 0], window) or parsed  # rows of padding alone, in a text shorter than W
    if bias is None:
        return parsed
    if isinstance(parsed, Packed):
        parsed = Mask(query_length, key_length, dense=dense, causal=False)
    return replace(parsed, bias=bias)


def split(attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split a 4D mask, bool or additive, into what it allows (bool) and what it adds to the scores (None: nothing).

    In an additive mask, 0 allows, a very negative number forbids, and all between is a bias.
    """
    if attention_mask.dtype == torch.bool:
        return attention_mask, None
    lowest = torch.finfo(attention_mask.dtype).min / 2 if attention_mask.is_floating_point() else 0
    allowed = attention_mask > lowest
    if not values_are_hidden() and not (attention_mask < math.inf).all():
        raise ValueError(
            "attention_mask has NaN or +inf; expected 0 where allowed, a very negative number where not, or a bias"
        )
    bias = attention_mask.masked_fill(~allowed, 0)
    if not attention_mask.is_floating_point() or _all(bias == 0):
        return allowed, None
    return allowed, bias


def _all(allowed: Tensor) -> bool:
    """Return whether all entries are True. Where values are hidden this says no, and the mask is kept."""
    return not values_are_hidden() and bool(allowed.all())


def _parse_matrix(dense: Tensor, causal: bool) -> Mask | Packed:
    """Padding, or packed segments, where that says the same as the matrix for every row that is a valid token."""
    query_length, key_length = dense.shape[-2:]
    if dense.shape[1] != 1:
        return Mask(query_length, key_length, dense=dense)
    matrix = dense[:, 0]
    one_row = dense.stride(2) == 0 or query_length == 1  # expanded, as transformers makes it: nothing to compare
    if not causal and (one_row or _all(matrix == matrix[:, :1])):
        matrix = matrix[:, :1]
        return Mask(query_length, key_length, valid=None if _all(matrix) else matrix[:, 0], causal=False)
    if values_are_hidden():
        return Mask(query_length, key_length, dense=dense, causal=False)

    def rows(start: int, stop: int) -> Tensor:
        return dense[:, :, start:stop]

    if query_length == key_length:
        for causal in (True, False):
            segments = find_segments(rows, key_length, causal)
            if segments is not None:
                return from_segments(segments, causal)
    elif query_length < key_length:
        offset = key_length - query_length
        valid = torch.cat([matrix[:, 0, :offset], matrix[:, :, offset:].diagonal(dim1=1, dim2=2)], dim=1)
        candidate = Mask(query_length, key_length, valid=valid)
        if (candidate.matrix(dense.device)[:, 0] == matrix).all():
            return Mask(query_length, key_length) if valid.all() else candidate
    return Mask(query_length, key_length, dense=dense, causal=False)


def parse_sliding(matrix: Tensor, window: int, block: int = 256) -> Mask | Packed | None:
    """Read a sliding causal mask off a matrix, bool `[B, T, S]`: with padding at the ends of texts, or packed texts.

    Args:
        window: W; row i of the T may attend to the valid keys of its text from `i + S - T - W + 1` to `i + S - T`.

    Returns:
        A mask with this window; the keys that no row may see, those before, come back as valid. None where the matrix
        is something else. Rows of tokens that do not see themselves are padding, and may attend to anything.
        Where the first of T is one, it has to see those of the keys before that count.
    """
    query_length, key_length = matrix.shape[1:]
    offset = key_length - query_length
    own = matrix.diagonal(offset, dim1=1, dim2=2)
    valid = torch.cat([matrix[:, 0, :offset], own], dim=1)
    valid[:, : max(0, offset - window + 1)] = True
    if offset:
        segments = valid.int()
    else:  # a text begins with a token that does not see the one before it
        sees_last = F.pad(matrix.diagonal(-1, dim1=1, dim2=2), (1, 0))
        segments = (own & ~sees_last).cumsum(1).masked_fill(~own, 0).to(torch.int32)
    key = torch.arange(key_length, device=matrix.device)
    for start in range(0, query_length, block):
        rows = slice(start, min(start + block, query_length))
        row = key[offset:][rows, None]
        text = segments[:, offset:][:, rows, None]
        expected = (text == segments[:, None, :]) & (key <= row) & (key > row - window)
        if not ((expected == matrix[:, rows]) | (text == 0)).all():
            return None
    if offset and (matrix[:, :, offset:] & ~own[:, None]).any():
        return None  # what does not see itself is seen by others: no padding
    parsed = Mask(query_length, key_length, None if valid.all() else valid) if offset else from_segments(segments)
    return replace(parsed, window=window)


def from_segments(segments: Tensor, causal: bool = True) -> Mask | Packed:
    """Return segments, int `[B, n]` (0: padding), as a plain mask where every row holds one text, else as `Packed`."""
    length, valid = segments.shape[1], segments > 0
    first = torch.where(valid, segments, segments.max() + 1).amin(1, keepdim=True)
    if (valid & (segments != first)).any():
        return Packed(segments, causal)
    return Mask(length, length, valid=None if valid.all() else valid, causal=causal)


def find_segments(
    rows_of_matrix: Callable[[int, int], Tensor], length: int, causal: bool = True, block: int = 256
) -> Tensor | None:
    """Read the texts packed into rows off a mask, by blocks of rows: O(n) memory, one look at n^2 entries.

    Args:
        rows_of_matrix: `(start, stop) -> bool [B, 1, stop - start, length]`.

    Returns:
        int32 `[B, length]`: 0 for padding, the same number for the tokens of one text; None where the mask is
        something else than attention (causal, or to the whole text) inside texts. Tokens that do not see themselves
        are padding, and may attend to anything: nobody reads them.
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
        expected = own == segments[:, None, :]
        if causal:
            expected &= position[None, :] <= position[start:stop, None]
        if not ((expected == rows_of_matrix(start, stop)[:, 0]) | (own == 0)).all():
            return None
    return segments
