"""Lay long texts out by chunks of tokens, so that all chunks of a block are one batch of small matrices.

In the layouts a "row" of matrices is one pair of text and key/value head: there are `B Hkv` of them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Tokens of a block on a CPU: 9 heads with 64 features each take 0.6 MB.
BLOCK = 256


def blocks(length: int, chunk: int, most: int = BLOCK) -> Iterator[slice]:
    """Yield slices of the tokens 0 to `length`, in order: blocks of whole chunks, then the tokens that fill no chunk.

    Args:
        length: number of tokens.
        chunk: tokens per chunk.
        most: tokens per block, rounded down to whole chunks, at least one chunk.
    """
    start, most = 0, max(chunk, most // chunk * chunk)
    while start < length:
        size = min(most, length - start)
        size = size if size < chunk else size // chunk * chunk
        yield slice(start, start + size)
        start += size


def to_rows(x: Tensor, rows: int) -> Tensor:
    """Return `[B, H, t, F]` as `[B Hkv, G t, F]`: the query heads of a group below each other, as one matrix.

    Args:
        rows: number of matrices, `B Hkv`.
    """
    return x.reshape(rows, -1, x.shape[-1])


def to_chunks(x: Tensor, kv_heads: int, chunk: int) -> Tensor:
    """Return `[B, H, c t, F]` as `[c, B Hkv, G t, F]`: one matrix per chunk and key/value head, as `to_rows` makes it.

    Args:
        chunk: tokens t per chunk; the length must be a multiple of it.
    """
    batch, heads, length, width = x.shape
    grouped = x.reshape(batch * kv_heads, heads // kv_heads, length // chunk, chunk, width)
    rows = heads // kv_heads * chunk
    return grouped.permute(2, 0, 1, 3, 4).reshape(length // chunk, batch * kv_heads, rows, width)


def by_heads(x: Tensor, batch: int, chunk: int) -> Tensor:
    """Return `[c, B Hkv, G t, F]` as a view `[B, Hkv, G, c, t, F]`, for `batch` texts and t = `chunk` tokens."""
    chunks, rows, _, width = x.shape
    return x.view(chunks, batch, rows // batch, -1, chunk, width).permute(1, 2, 3, 0, 4, 5)


def from_chunks(x: Tensor, batch: int, chunk: int) -> Tensor:
    """Return `[c, B Hkv, G t, F]` as `[B, H, c t, F]`: the inverse of `to_chunks`."""
    return by_heads(x, batch, chunk).flatten(3, 4).flatten(1, 2)


def product(x: Tensor, y: Tensor, add_to: Tensor | None = None) -> Tensor:
    """Return the matrix products `x y` over `[c, R, *, *]`.

    Where `add_to` is given, the products are added to that tensor in place, and `add_to` is returned.
    """
    x, y, leading = x.flatten(0, 1), y.flatten(0, 1), x.shape[:2]
    if add_to is None:
        return torch.bmm(x, y).unflatten(0, leading)
    add_to.flatten(0, 1).baddbmm_(x, y)
    return add_to


def tril_(x: Tensor, chunk: int) -> Tensor:
    """Set to zero, in place, the entries of `[..., G t, t]` whose key comes after the query of their row; return `x`.

    Args:
        x: contiguous; G matrices of `chunk` by `chunk` below each other.
        chunk: tokens t per chunk.
    """
    x.view(-1, chunk, chunk).tril_()
    return x


def in_large_kernels(x: Tensor) -> bool:
    """Return whether the portable forms take long texts in a few large kernels, not in blocks that fit a CPU's cache.

    True on any device but the CPU, and wherever torch.compile traces the code.
    """
    return torch.compiler.is_compiling() or x.device.type != "cpu"
