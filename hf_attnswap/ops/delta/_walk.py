"""The one pass that goes from chunk to chunk: the state S forwards, its gradient R backwards.

With d_j what remains at the end of the chunk of what token j added, and g of the state before it,

    U = U - W S            S = g S + K^T (d U)
    dU = dU + d (K R)      R = g R + B - W^T dU

where U begins as (I + N)^-1 beta V, dU as what the rows of the chunk give, and B is the sum of f_i q_i do_i^T.
"""

import triton
import triton.language as tl

from ..linear._gates import end_of_chunk, log_sums, remaining, remaining_at
from ..tiles import dot, head, load_rows, store_rows


@triton.jit(do_not_specialize=["KV", "T", "NC"])
def walk(
    X, Y, U, ADDED, STATES, SUMS, FIRST, LAST, xb, xh, xt, yb, yh, yt, KV, T, NC,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, BACKWARDS: tl.constexpr, C: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Replace U `[B KV, T, DV]` (BACKWARDS dU) and write S before (R after) each chunk; BE of the columns a program.

    X, Y: W and K, BACKWARDS K and W. STATES and, BACKWARDS, ADDED, which is B: `[B KV, NC, D DV]`. FIRST, LAST: the
    states before and after all, `[B KV, D, DV]`. A grid of (B KV, blocks of BE columns).
    """
    r = tl.program_id(0)
    i = tl.arange(0, C)
    d = tl.arange(0, BD)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    inside = (d < D)[:, None] & (e < DV)[None, :]
    within = d[:, None] * DV + e[None, :]
    x0 = head(X, r // KV, r % KV, xb, xh)
    y0 = head(Y, r // KV, r % KV, yb, yh)
    u0 = U + r.to(tl.int64) * T * DV
    sums = SUMS + r.to(tl.int64) * T
    s = tl.zeros((BD, BE), tl.float32)
    if HAS_FIRST:
        s = tl.load(FIRST + r.to(tl.int64) * (D * DV) + within, mask=inside, other=0.0)
    for n in range(0, NC):
        c = NC - 1 - n if BACKWARDS else n
        x = load_rows(x0, c * C, xt, i, T, d, D)
        y = load_rows(y0, c * C, yt, i, T, d, D)
        u = load_rows(u0, c * C, DV, i, T, e, DV).to(tl.float32)
        place = (r * NC + c).to(tl.int64) * (D * DV) + within
        tl.store(STATES + place, s, mask=inside)
        p = dot(x, s.to(x.dtype), IP)
        if HAS_GATE:
            high, low = log_sums(sums, c * C + i, T)
            left = remaining_at(high, low, sums, c, T, C, True)[:, None]
            high, low = end_of_chunk(sums, c, T, C)
            before_high, before_low = end_of_chunk(sums, c - 1, T, C)
            s *= remaining(high, low, before_high, before_low)
            if BACKWARDS:
                p *= left
        u = u + p if BACKWARDS else u - p
        store_rows(u0, c * C, DV, i, T, e, DV, u)
        if BACKWARDS:
            s += tl.load(ADDED + place, mask=inside, other=0.0)
            s -= dot(tl.trans(y), u.to(y.dtype), IP)
        else:
            if HAS_GATE:
                u *= left
            s += dot(tl.trans(y), u.to(y.dtype), IP)
    if HAS_LAST:
        tl.store(LAST + r.to(tl.int64) * (D * DV) + within, s, mask=inside)
