"""The feature maps of the kernels: those that work element by element, and the one of hedgehog.

    identity  x      elu  e^min(x, 0) + max(x, 0)      relu  max(x, 0)
    hedgehog  [softmax(y), softmax(-y)],  y = x + x delta_h;  beside a softmax [e^(y - l), e^(-y - l)], l = max |y|

Element-wise maps are made where a kernel reads its tile; the features of hedgehog, which need a product, are made once.
"""

import triton
import triton.language as tl

from ..tiles import LOG2E, dot, head, load_rows, store_rows

IDENTITY, ELU, RELU = (tl.constexpr(i) for i in range(3))


@triton.jit
def _elementwise(x, MAP: tl.constexpr):
    if MAP == ELU:
        return tl.exp2(tl.minimum(x, 0.0) * LOG2E) + tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif MAP == RELU:
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return x


@triton.jit
def counted(MASK, rows, length, HAS_MASK: tl.constexpr):
    """Return which tokens there are and leave a trace. MASK: of the text, uint8."""
    ok = rows < length
    if HAS_MASK:
        ok = ok & (tl.load(MASK + rows, mask=ok, other=0) != 0)
    return ok


@triton.jit
def load_features(
    base, first, stride, rows, length, columns, scale, MASK, WIDTH: tl.constexpr, MAP: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Return the features of tokens `[rows, columns]`, in the dtype of the tensor, 0 for tokens that leave no trace."""
    x = load_rows(base, first, stride, rows, length, columns, WIDTH)
    if (MAP != IDENTITY) or HAS_MASK:
        ok = counted(MASK, first + rows, length, HAS_MASK)[:, None] & (columns < WIDTH)[None, :]
        x = tl.where(ok, _elementwise(x.to(tl.float32) * scale, MAP), 0.0).to(base.dtype.element_ty)
    return x


@triton.jit
def slopes(
    base, first, stride, rows, length, columns, scale, MASK, WIDTH: tl.constexpr, MAP: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Return the derivatives of what `load_features` returns by the numbers of the tensor, in float32."""
    ok = counted(MASK, first + rows, length, HAS_MASK)
    if MAP == IDENTITY:
        slope = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32) + 1.0
    else:
        x = load_rows(base, first, stride, rows, length, columns, WIDTH).to(tl.float32) * scale
        if MAP == ELU:
            slope = tl.exp2(tl.minimum(x, 0.0) * LOG2E) * scale
        else:
            slope = tl.where(x > 0, scale, 0.0)
    return tl.where(ok[:, None], slope, 0.0)


@triton.jit
def _softmax(y):
    e = tl.exp2((y - tl.max(y, 1)[:, None]) * LOG2E)
    return e / tl.sum(e, 1)[:, None]


@triton.jit(do_not_specialize=["H", "T"])
def hedgehog(
    X, DELTA, OUT, LEFT, xb, xh, xt, ob, oh, ot, H, T, scale,
    D: tl.constexpr, BD: tl.constexpr, BESIDE: tl.constexpr, IP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write the features `[B, H, T, 2 D]` of BM tokens of X `[B, H, T, D]`, times scale before; l to LEFT where BESIDE.

    DELTA: `[H, D, D]`, contiguous, in the dtype of X. LEFT: `[B, H, T]`.
    """
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    r0 = tl.program_id(0) * BM
    m = tl.arange(0, BM)
    d = tl.arange(0, BD)
    inside = (d < D)[None, :]
    x = load_rows(head(X, b, h, xb, xh), r0, xt, m, T, d, D)
    delta = load_rows(DELTA + h * D * D, 0, D, d, D, d, D)
    y = (x.to(tl.float32) + dot(x, delta, IP)) * scale
    if BESIDE:
        left = tl.max(tl.abs(y), 1)
        tl.store(LEFT + bh * T + r0 + m, left, mask=r0 + m < T)
        f = tl.exp2((y - left[:, None]) * LOG2E)
        g = tl.exp2((-y - left[:, None]) * LOG2E)
    else:
        f = _softmax(tl.where(inside, y, float("-inf")))
        g = _softmax(tl.where(inside, -y, float("-inf")))
    out = head(OUT, b, h, ob, oh)
    store_rows(out, r0, ot, m, T, d, D, f)
    store_rows(out + D, r0, ot, m, T, d, D, g)


@triton.jit(do_not_specialize=["H", "T"])
def hedgehog_backward(
    FEATURES, GRAD, DELTA, DY, DX, fb, fh, ft, gb, gh, gt, yb, yh, yt, xb, xh, xt, H, T, scale,
    D: tl.constexpr, BD: tl.constexpr, BESIDE: tl.constexpr, IP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write the gradients of y and of x for those of the features: dy = f (df - f.df) - g (dg - g.dg), dx = dy W^T.

    BESIDE, l is a constant to the gradient: dy = f df - g dg.
    """
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    r0 = tl.program_id(0) * BM
    m = tl.arange(0, BM)
    d = tl.arange(0, BD)
    features = head(FEATURES, b, h, fb, fh)
    grad = head(GRAD, b, h, gb, gh)
    f = load_rows(features, r0, ft, m, T, d, D).to(tl.float32)
    g = load_rows(features + D, r0, ft, m, T, d, D).to(tl.float32)
    df = f * load_rows(grad, r0, gt, m, T, d, D).to(tl.float32)
    dg = g * load_rows(grad + D, r0, gt, m, T, d, D).to(tl.float32)
    if not BESIDE:
        df -= f * tl.sum(df, 1)[:, None]
        dg -= g * tl.sum(dg, 1)[:, None]
    dy = (df - dg) * scale
    store_rows(head(DY, b, h, yb, yh), r0, yt, m, T, d, D, dy)
    delta = load_rows(DELTA + h * D * D, 0, D, d, D, d, D)
    dx = dy + dot(dy.to(delta.dtype), tl.trans(delta), IP)
    store_rows(head(DX, b, h, xb, xh), r0, xt, m, T, d, D, dx)
