"""What the Triton kernels of several ops share. Imported with the kernels only: it needs triton."""

import triton
import triton.language as tl

from .gpu import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, IP: tl.constexpr):
    """Return a @ b in float32. The interpreter multiplies the bits of bfloat16, so there in float32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=IP)


@triton.jit
def load_rows(base, first, stride, rows, length, columns, WIDTH: tl.constexpr, INSIDE: tl.constexpr = False):
    """Return `[rows, columns]` of a tensor whose tokens stand `stride` apart, 0 where there is no token or number.

    `base`: the head. `first`: the first token. `rows`: tokens from there on, all within the length where INSIDE.
    """
    at = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if not INSIDE:
        return tl.load(at, mask=(first + rows < length)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif columns.shape[0] > WIDTH:
        return tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def load_columns(base, first, stride, columns, length, rows, WIDTH: tl.constexpr, INSIDE: tl.constexpr = False):
    """Return the transpose of what `load_rows` returns, `[rows, columns]` with a token in each column."""
    at = base + tl.cast(first, tl.int64) * stride + columns[None, :] * stride + rows[:, None]
    if not INSIDE:
        return tl.load(at, mask=(first + columns < length)[None, :] & (rows < WIDTH)[:, None], other=0.0)
    elif rows.shape[0] > WIDTH:
        return tl.load(at, mask=(rows < WIDTH)[:, None], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(base, first, stride, rows, length, columns, WIDTH: tl.constexpr, x):
    """Write `[rows, columns]` to where `load_rows` reads, in the dtype of the tensor."""
    at = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    mask = (first + rows < length)[:, None] & (columns < WIDTH)[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def head(base, batch, head, stride_batch, stride_head):
    """Return where a head of a text begins."""
    return base + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
