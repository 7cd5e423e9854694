"""Long texts by chunks of tokens: layouts in which all chunks of a block are one batch of small matrices."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Tokens of a block on a CPU: 9 heads with 64 features each take 0.6 MB.
BLOCK = 256


def blocks(length: int, chunk: int, most: int = BLOCK) -> Iterator[slice]:
    """Blocks of whole chunks, of about `most` tokens, and one with what is left."""
    start, most = 0, max(chunk, most // chunk * chunk)
    while start < length:
        size = min(most, length - start)
        size = size if size < chunk else size // chunk * chunk
        yield slice(start, start + size)
        start += size


def to_rows(x: Tensor, rows: int) -> Tensor:
    """`[B, H, t, F]` -> `[B Hkv, G t, F]`: the query heads of a group below each other, as one matrix."""
    return x.reshape(rows, -1, x.shape[-1])


def to_chunks(x: Tensor, kv_heads: int, chunk: int) -> Tensor:
    """`[B, H, c t, F]` -> `[c, B Hkv, G t, F]`: one matrix per chunk and key/value head, as `to_rows` makes it."""
    batch, heads, length, width = x.shape
    grouped = x.reshape(batch * kv_heads, heads // kv_heads, length // chunk, chunk, width)
    return grouped.permute(2, 0, 1, 3, 4).reshape(length // chunk, batch * kv_heads, -1, width)


def by_heads(x: Tensor, batch: int, chunk: int) -> Tensor:
    """`[c, B Hkv, G t, F]` -> `[B, Hkv, G, c, t, F]`, a view."""
    chunks, rows, _, width = x.shape
    return x.view(chunks, batch, rows // batch, -1, chunk, width).permute(1, 2, 3, 0, 4, 5)


def from_chunks(x: Tensor, batch: int, chunk: int) -> Tensor:
    """The inverse of `to_chunks`."""
    return by_heads(x, batch, chunk).flatten(3, 4).flatten(1, 2)


def product(x: Tensor, y: Tensor, add_to: Tensor | None = None) -> Tensor:
    """`x y` over `[c, R, *, *]`, or `add_to + x y` in place of `add_to`."""
    x, y, leading = x.flatten(0, 1), y.flatten(0, 1), x.shape[:2]
    if add_to is None:
        return torch.bmm(x, y).unflatten(0, leading)
    add_to.flatten(0, 1).baddbmm_(x, y)
    return add_to


def tril_(x: Tensor, chunk: int) -> Tensor:
    """Zero, in place, what lies in the future in `[..., G t, t]`."""
    x.view(-1, chunk, chunk).tril_()
    return x


def in_large_kernels(x: Tensor) -> bool:
    """Whether the portable forms take long texts in a few large kernels instead of in blocks for a CPU's cache."""
    return torch.compiler.is_compiling() or x.device.type != "cpu"
