"""The kernels of the backward pass: scores are made again; nothing is added atomically.

With g_i the gradient of the output and l_i that of lse, p_ij = e^{s_ij - lse_i} and D_i = g_i . o_i - l_i:

    dv_j = sum_i p_ij g_i,   ds_ij = p_ij (g_i . v_j - D_i)

`of_queries` takes blocks of rows, `of_keys` blocks of slots with the rows whose windows they are in, and `of_sinks`
parts of the rows with the sinks, which all rows see: a sum for each part, so that no program goes through all rows.
"""

import triton
import triton.language as tl

from ..tiles import LOG2E, dot, head, load_columns, load_rows, store_rows
from ._forward import in_window, position_of_first


@triton.jit(do_not_specialize=["H", "T"])
def prepare(
    OUT, GRAD, GRAD_LSE, G_OUT, DELTA, ob, oh, ot, gb, gh, gt, H, T,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write g as products take it, `[B, H, T, DV]`, and D `[B, H, T]`, with the g that was rounded."""
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    r0 = tl.program_id(0) * BM
    m = tl.arange(0, BM)
    e = tl.arange(0, BDV)
    g = load_rows(head(GRAD, b, h, gb, gh), r0, gt, m, T, e, DV).to(G_OUT.dtype.element_ty)
    store_rows(G_OUT + bh.to(tl.int64) * T * DV, r0, DV, m, T, e, DV, g)
    out = load_rows(head(OUT, b, h, ob, oh), r0, ot, m, T, e, DV).to(tl.float32)
    at = bh * T + r0 + m
    delta = tl.sum(out * g.to(tl.float32), 1) - tl.load(GRAD_LSE + at, mask=r0 + m < T, other=0.0)
    tl.store(DELTA + at, delta, mask=r0 + m < T)


@triton.jit
def _lse(LSE, rows, T):
    """Return lse of rows, times log2 e; that of rows which see nothing makes all weights 0."""
    lse = tl.load(LSE + rows, mask=rows < T, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse) * LOG2E


@triton.jit(do_not_specialize=["H", "G", "T", "S"])
def of_queries(
    Q, K, V, SINK_K, SINK_V, COUNT, GRAD, LSE, DELTA, DQ,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ab, ah, at, cb, ch, ct, db, dh, dt, H, G, T, S, scale, window, ahead,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, SINKS: tl.constexpr, BS: tl.constexpr,
    HAS_COUNT: tl.constexpr, IP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write dq. GRAD, DELTA: as `prepare` leaves them; all else as `forward` takes or leaves it."""
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    r0 = tl.program_id(0) * BM
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    d = tl.arange(0, BD)
    e = tl.arange(0, BDV)
    rows = r0 + m
    before = position_of_first(COUNT, b, HAS_COUNT)
    q = load_rows(head(Q, b, h, qb, qh), r0, qt, m, T, d, D)
    g = load_rows(GRAD + bh.to(tl.int64) * T * DV, r0, DV, m, T, e, DV)
    lse = _lse(LSE + bh * T, rows, T)
    delta = tl.load(DELTA + bh * T + rows, mask=rows < T, other=0.0)
    k0 = head(K, b, h // G, kb, kh)
    v0 = head(V, b, h // G, vb, vh)
    acc = tl.zeros((BM, BD), tl.float32)
    if SINKS > 0:
        j = tl.arange(0, BS)
        sink_k = load_rows(head(SINK_K, b, h // G, ab, ah), 0, at, j, SINKS, d, D)
        sink_v = load_columns(head(SINK_V, b, h // G, cb, ch), 0, ct, j, SINKS, e, DV)
        begun = (j < SINKS)[None, :] & (j[None, :] <= (rows + before)[:, None])
        of_sinks = tl.where(begun, tl.exp2(dot(q, tl.trans(sink_k), IP) * (scale * LOG2E) - lse[:, None]), 0.0)
        acc += dot((of_sinks * (dot(g, sink_v, IP) - delta[:, None])).to(q.dtype), sink_k, IP)
    lo = tl.maximum(r0 + ahead - window + 1, 0) // BN * BN
    for first in range(lo, tl.minimum(r0 + BM + ahead, S), BN):
        k = load_rows(k0, first, kt, n, S, d, D)
        see = in_window((first + n)[None, :], rows[:, None], before, ahead, S, window, SINKS)
        p = tl.where(see, tl.exp2(dot(q, tl.trans(k), IP) * (scale * LOG2E) - lse[:, None]), 0.0)
        da = dot(g, load_columns(v0, first, vt, n, S, e, DV), IP) - delta[:, None]
        acc += dot((p * da).to(q.dtype), k, IP)
    store_rows(head(DQ, b, h, db, dh), r0, dt, m, T, d, D, acc * scale)


@triton.jit
def _of_tile(
    dk, dv, k, v, Q, GRAD, LSE, DELTA, first, stride, see, T, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Return the sums for a block of keys with BM rows of one head added. see: `[keys, BM]`."""
    m = tl.arange(0, BM)
    q = load_rows(Q, first, stride, m, T, tl.arange(0, BD), D)
    g = load_rows(GRAD, first, DV, m, T, tl.arange(0, BDV), DV)
    delta = tl.load(DELTA + first + m, mask=first + m < T, other=0.0)
    p = tl.exp2(dot(k, tl.trans(q), IP) * (scale * LOG2E) - _lse(LSE, first + m, T)[None, :])
    p = tl.where(see & (first + m < T)[None, :], p, 0.0)
    dv += dot(p.to(q.dtype), g, IP)
    dk += dot((p * (dot(v, tl.trans(g), IP) - delta[None, :])).to(q.dtype), q, IP)
    return dk, dv


@triton.jit(do_not_specialize=["H", "G", "T", "S"])
def of_keys(
    Q, K, V, COUNT, GRAD, LSE, DELTA, DK, DV_,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, eb, eh, et, H, G, T, S, scale, window, ahead,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, SINKS: tl.constexpr,
    HAS_COUNT: tl.constexpr, IP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of BN slots, the sums over the G heads that share them; a grid of (blocks of slots, B Hkv)."""
    bk = tl.program_id(1)
    b = bk // (H // G)
    hk = bk % (H // G)
    c0 = tl.program_id(0) * BN
    n = tl.arange(0, BN)
    before = position_of_first(COUNT, b, HAS_COUNT)
    k = load_rows(head(K, b, hk, kb, kh), c0, kt, n, S, tl.arange(0, BD), D)
    v = load_rows(head(V, b, hk, vb, vh), c0, vt, n, S, tl.arange(0, BDV), DV)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BDV), tl.float32)
    lo = tl.maximum(c0 - ahead, 0) // BM * BM
    hi = tl.minimum(c0 + BN - 1 - ahead + window, T)
    for i in range(0, G):
        h = hk * G + i
        at = (b * H + h) * T
        q0 = head(Q, b, h, qb, qh)
        g0 = GRAD + at.to(tl.int64) * DV
        for first in range(lo, hi, BM):
            rows = first + tl.arange(0, BM)
            see = in_window((c0 + n)[:, None], rows[None, :], before, ahead, S, window, SINKS)
            dk, dv = _of_tile(dk, dv, k, v, q0, g0, LSE + at, DELTA + at, first, qt, see, T, scale, D, DV, BD, BDV, BM,
                              IP)  # fmt: skip
    store_rows(head(DK, b, hk, db, dh), c0, dt, n, S, tl.arange(0, BD), D, dk * scale)
    store_rows(head(DV_, b, hk, eb, eh), c0, et, n, S, tl.arange(0, BDV), DV, dv)


@triton.jit(do_not_specialize=["H", "G", "T"])
def of_sinks(
    Q, K, V, COUNT, GRAD, LSE, DELTA, DK, DV_, qb, qh, qt, kb, kh, kt, vb, vh, vt, H, G, T, scale, part,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, SINKS: tl.constexpr, BS: tl.constexpr,
    HAS_COUNT: tl.constexpr, IP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of the sinks for one part of the rows, `[parts, B Hkv, SINKS, *]`; a grid of (parts, B Hkv)."""
    bk = tl.program_id(1)
    b = bk // (H // G)
    hk = bk % (H // G)
    j = tl.arange(0, BS)
    before = position_of_first(COUNT, b, HAS_COUNT)
    k = load_rows(head(K, b, hk, kb, kh), 0, kt, j, SINKS, tl.arange(0, BD), D)
    v = load_rows(head(V, b, hk, vb, vh), 0, vt, j, SINKS, tl.arange(0, BDV), DV)
    dk = tl.zeros((BS, BD), tl.float32)
    dv = tl.zeros((BS, BDV), tl.float32)
    lo = tl.program_id(0) * part
    for i in range(0, G):
        h = hk * G + i
        at = (b * H + h) * T
        q0 = head(Q, b, h, qb, qh)
        g0 = GRAD + at.to(tl.int64) * DV
        for first in range(lo, tl.minimum(lo + part, T), BM):
            rows = first + tl.arange(0, BM)
            see = (j < SINKS)[:, None] & (j[:, None] <= (rows + before)[None, :])
            dk, dv = _of_tile(dk, dv, k, v, q0, g0, LSE + at, DELTA + at, first, qt, see, T, scale, D, DV, BD, BDV, BM,
                              IP)  # fmt: skip
    place = (tl.program_id(0) * tl.num_programs(1) + bk) * SINKS
    store_rows(DK + place * D, 0, D, j, SINKS, tl.arange(0, BD), D, dk * scale)
    store_rows(DV_ + place * DV, 0, DV, j, SINKS, tl.arange(0, BDV), DV, dv)
