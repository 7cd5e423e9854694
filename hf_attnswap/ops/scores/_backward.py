"""The kernels of the backward pass: scores are made again, tile by tile; nothing is added atomically.

With g_i the gradient of row i, d_i its denominator and D_i = g_i . o_i where d_i is the sum of the weights (else 0),

    dv_j = sum_i a_ij g_i / d_i,   da_ij = (g_i . v_j - D_i) / d_i,   ds'_ij = da_ij a'(s'_ij)

less sum_j ds'_ij at the peak of the row, where the activation reads that.

`prepare` makes D, `of_queries` goes through the keys of a block of rows, `of_keys` through the rows of all query heads
that share a block of keys. Counts divide g beforehand; sums divide after the products, because g . v - D may
be a small difference of large numbers.
"""

import triton
import triton.language as tl

from ..tiles import dot, head, load_columns, load_rows, store_rows
from ._activations import POWER, RELU, row_number, scale_of_scores, weights_and_slopes
from ._rows import allowed, column_phases, counts, key_range


@triton.jit(do_not_specialize=["H", "T", "S"])
def prepare(
    OUT, GRAD, TOTALS, G_OUT, DELTA, COUNT, ob, oh, ot, gb, gh, gt, H, T, S, alpha, eps,
    DV: tl.constexpr, BDV: tl.constexpr, COUNTED: tl.constexpr, TOTAL: tl.constexpr, CAUSAL: tl.constexpr,
    PAD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write g as products take it, `[B, H, T, DV]`, over the counts where COUNTED; where TOTAL, D too, `[B, H, T]`."""
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    r0 = tl.program_id(0) * BM
    m = tl.arange(0, BM)
    columns = tl.arange(0, BDV)
    g = load_rows(head(GRAD, b, h, gb, gh), r0, gt, m, T, columns, DV).to(tl.float32)
    if COUNTED:
        g = g * tl.exp2(-alpha * tl.log2(counts(COUNT, b, r0 + m, S - T, T, S, CAUSAL, PAD)))[:, None]
    g = g.to(G_OUT.dtype.element_ty)
    store_rows(G_OUT + bh.to(tl.int64) * T * DV, r0, DV, m, T, columns, DV, g)
    if TOTAL:
        out = load_rows(head(OUT, b, h, ob, oh), r0, ot, m, T, columns, DV).to(tl.float32)
        total = tl.load(TOTALS + bh * T + r0 + m, mask=r0 + m < T, other=1.0)
        # Without eps a row whose sum is 0 is divided by 1, whatever the sum.
        delta = tl.where((eps > 0) | (total > 0), tl.sum(out * g.to(tl.float32), 1), 0.0)
        tl.store(DELTA + bh * T + r0 + m, delta, mask=r0 + m < T)


@triton.jit
def _of_row(POINTER, rows, T, other: tl.constexpr):
    return tl.load(POINTER + rows, mask=rows < T, other=other)


@triton.jit
def _divisor(TOTALS, rows, T, eps):
    """Return 1 / d of rows that are divided by their sum."""
    total = tl.load(TOTALS + rows, mask=rows < T, other=1.0)
    return 1.0 / tl.where((eps > 0) | (total > 0), total + eps, 1.0)


@triton.jit
def _through_keys(
    acc, sums, q, g, k0, v0, stride_k, stride_v, VALID, lo, hi, positions, start, end, whole, ks, row, delta, S,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, ACT: tl.constexpr,
    LOGP: tl.constexpr, CAUSAL: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr, SUM: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Return sum_j ds_ij k_j and, where SUM, sum_j ds_ij, with the keys from lo to hi added."""
    n = tl.arange(0, BN)
    for first in range(lo, hi, BN):
        k = load_rows(k0, first, stride_k, n, S, tl.arange(0, BD), D, not MASKED)
        x = dot(q, tl.trans(k), IP)
        if MASKED:
            ok = allowed(VALID, (first + n)[None, :], positions[:, None], start, end, whole, CAUSAL, PAD)
            x = tl.where(ok, x, float("-inf"))
        _, slope = weights_and_slopes(x, ks, row[:, None], ACT, LOGP)
        if ACT == POWER:
            if tl.max(tl.max(slope, 1), 0) > 0:
                vt = load_columns(v0, first, stride_v, n, S, tl.arange(0, BDV), DV, not MASKED)
                ds = slope * (dot(g, vt, IP) - delta[:, None])
                sums += tl.sum(ds, 1)
                acc += dot(ds.to(q.dtype), k, IP)
        else:
            vt = load_columns(v0, first, stride_v, n, S, tl.arange(0, BDV), DV, not MASKED)
            ds = slope * (dot(g, vt, IP) - delta[:, None])
            if SUM:
                sums += tl.sum(ds, 1)
            acc += dot(ds.to(q.dtype), k, IP)
    return acc, sums


@triton.jit(do_not_specialize=["H", "G", "T", "S"])
def of_queries(
    Q, K, V, GRAD, DQ, TOTALS, PEAKS, PEAK_AT, DELTA, SUMS, OF_FACTOR, OFFSET, FACTOR, VALID, RANGE, COUNT,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, H, G, T, S, scale, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ACT: tl.constexpr, LOGP: tl.constexpr,
    TOTAL: tl.constexpr, CAUSAL: tl.constexpr, PAD: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_FACTOR: tl.constexpr,
    IP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write dq and, of each row, sum_j ds'_ij (where a peak or an offset needs it) and its part of df_h (HAS_FACTOR).

    GRAD: as `prepare` leaves g. SUMS, OF_FACTOR: `[B, H, T]`. All else as `forward` takes or leaves it.
    """
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    r0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    m = tl.arange(0, BM)
    rows = r0 + m
    offset = S - T
    d = tl.arange(0, BD)
    of_rows = bh * T
    start, end, whole = key_range(RANGE, b, S, PAD)
    q = load_rows(head(Q, b, h, qb, qh), r0, qt, m, T, d, D)
    g = load_rows(GRAD + bh.to(tl.int64) * T * DV, r0, DV, m, T, tl.arange(0, BDV), DV)
    k0 = head(K, b, h // G, kb, kh)
    v0 = head(V, b, h // G, vb, vh)
    valid = VALID + b.to(tl.int64) * S
    lo, free_lo, free_hi, hi = column_phases(r0, offset, start, end, whole, BM, BN, CAUSAL)
    positions = rows + offset
    ks = scale
    if HAS_FACTOR:
        ks = scale * tl.load(FACTOR + h)
    xs = scale_of_scores(ks, ACT)
    shift = 0.0
    if HAS_OFFSET:
        shift = tl.load(OFFSET + h)
    peak = tl.zeros((BM,), tl.float32)
    if ACT > 4:
        peak = _of_row(PEAKS + of_rows, rows, T, 0.0)
    row = row_number(peak, xs, counts(COUNT, b, rows, offset, T, S, CAUSAL, PAD), shift, ACT)
    delta = tl.zeros((BM,), tl.float32)
    if TOTAL:
        delta = _of_row(DELTA + of_rows, rows, T, 0.0)
    SUM: tl.constexpr = (ACT == POWER) or HAS_OFFSET
    acc = tl.zeros((BM, BD), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    if PAD:
        acc, sums = _through_keys(acc, sums, q, g, k0, v0, kt, vt, valid, lo, free_lo, positions, start, end, whole, xs,
                                  row, delta, S, D, DV, BD, BDV, BN, ACT, LOGP, CAUSAL, PAD, True, SUM, IP)  # fmt: skip
    acc, sums = _through_keys(acc, sums, q, g, k0, v0, kt, vt, valid, free_lo, free_hi, positions, start, end, whole,
                              xs, row, delta, S, D, DV, BD, BDV, BN, ACT, LOGP, CAUSAL, PAD, False, SUM,
                              IP)  # fmt: skip
    acc, sums = _through_keys(acc, sums, q, g, k0, v0, kt, vt, valid, free_hi, hi, positions, start, end, whole, xs,
                              row, delta, S, D, DV, BD, BDV, BN, ACT, LOGP, CAUSAL, PAD, True, SUM, IP)  # fmt: skip
    if ACT == POWER:
        at = _of_row(PEAK_AT + of_rows, rows, T, 0)
        top = tl.load(k0 + at.to(tl.int64)[:, None] * kt + d[None, :], mask=(d < D)[None, :], other=0.0)
        acc -= sums[:, None] * top.to(tl.float32)
    if TOTAL:
        acc = acc * _divisor(TOTALS + of_rows, rows, T, eps)[:, None]
    if SUM:
        tl.store(SUMS + of_rows + rows, sums, mask=rows < T)
    acc = acc * (scale * (1 << LOGP))
    if HAS_FACTOR:
        tl.store(OF_FACTOR + of_rows + rows, tl.sum(acc * q.to(tl.float32), 1), mask=rows < T)
        acc = acc * tl.load(FACTOR + h)
    store_rows(head(DQ, b, h, db, dh), r0, dt, m, T, d, D, acc)


@triton.jit
def _through_rows(
    dk, dv, k, v, Q, GRAD, TOTALS, PEAKS, PEAK_AT, DELTA, SUMS, COUNT, seen, stride_q, lo, hi, offset, b, T, S, columns,
    ks, factor, shift, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, ACT: tl.constexpr,
    LOGP: tl.constexpr, TOTAL: tl.constexpr, CAUSAL: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr,
    HAS_FACTOR: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Return sum_i ds_ij q_i and sum_i a_ij g_i / d_i, with the rows from lo to hi of one head added."""
    m = tl.arange(0, BM)
    for first in range(lo, hi, BM):
        rows = first + m
        q = load_rows(Q, first, stride_q, m, T, tl.arange(0, BD), D, not MASKED)
        g = load_rows(GRAD, first, DV, m, T, tl.arange(0, BDV), DV, not MASKED)
        x = dot(k, tl.trans(q), IP)
        ok = seen[:, None] & (rows < T)[None, :]
        if MASKED:
            if CAUSAL:
                ok = ok & (columns[:, None] <= (rows + offset)[None, :])
        if MASKED or PAD:
            x = tl.where(ok, x, float("-inf"))
        peak = tl.zeros((BM,), tl.float32)
        if ACT > 4:
            peak = _of_row(PEAKS, rows, T, 0.0)
        row = row_number(peak, ks, counts(COUNT, b, rows, offset, T, S, CAUSAL, PAD), shift, ACT)
        a, slope = weights_and_slopes(x, ks, row[None, :], ACT, LOGP)
        if TOTAL:
            inv = _divisor(TOTALS, rows, T, eps)[None, :]
            a = a * inv
            slope = slope * inv
        if HAS_FACTOR:
            slope = slope * factor
            if ACT == RELU:
                a = a * factor
        if ACT == POWER:
            if tl.max(tl.max(slope, 1), 0) > 0:
                dv += dot(a.to(q.dtype), g, IP)
                ds = slope * (dot(v, tl.trans(g), IP) - _of_row(DELTA, rows, T, 0.0)[None, :])
                of_peak = _of_row(SUMS, rows, T, 0.0)[None, :] * inv
                if HAS_FACTOR:
                    of_peak = of_peak * factor
                at = _of_row(PEAK_AT, rows, T, 0)
                ds = tl.where(columns[:, None] == at[None, :], ds - of_peak, ds)
                dk += dot(ds.to(q.dtype), q, IP)
        else:
            dv += dot(a.to(q.dtype), g, IP)
            da = dot(v, tl.trans(g), IP)
            if TOTAL:
                da = da - _of_row(DELTA, rows, T, 0.0)[None, :]
            dk += dot((slope * da).to(q.dtype), q, IP)
    return dk, dv


@triton.jit(do_not_specialize=["H", "G", "T", "S"])
def of_keys(
    Q, K, V, GRAD, DK, DV_, TOTALS, PEAKS, PEAK_AT, DELTA, SUMS, OFFSET, FACTOR, VALID, RANGE, COUNT,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, eb, eh, et, H, G, T, S, scale, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ACT: tl.constexpr, LOGP: tl.constexpr,
    TOTAL: tl.constexpr, CAUSAL: tl.constexpr, PAD: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_FACTOR: tl.constexpr,
    IP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of BN keys, the sums over all rows of the G heads that share them; a grid of (blocks, B Hkv)."""
    bk = tl.program_id(1)
    kv_heads = H // G
    b = bk // kv_heads
    hk = bk % kv_heads
    c0 = tl.program_id(0) * BN
    n = tl.arange(0, BN)
    columns = c0 + n
    offset = S - T
    d = tl.arange(0, BD)
    e = tl.arange(0, BDV)
    start, end, whole = key_range(RANGE, b, S, PAD)
    k = load_rows(head(K, b, hk, kb, kh), c0, kt, n, S, d, D)
    v = load_rows(head(V, b, hk, vb, vh), c0, vt, n, S, e, DV)
    seen = allowed(VALID + b.to(tl.int64) * S, columns, columns, start, end, whole, False, PAD)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BDV), tl.float32)
    lo = 0
    free = 0
    if CAUSAL:  # the first row that sees a key, and the first that sees all
        lo = tl.maximum(c0 - offset, 0) // BM * BM
        free = tl.maximum(tl.cdiv(tl.maximum(c0 + BN - 1 - offset, 0), BM) * BM, lo)
    if PAD:
        nothing = (c0 >= end) | (c0 + BN <= start)
        lo = tl.where(nothing, T, lo)
        free = tl.where(nothing, T, free)
    free = tl.minimum(free, T)
    rest = tl.maximum(T // BM * BM, free)
    for i in range(0, G):
        h = hk * G + i
        bh = b * H + h
        at = bh * T
        q0 = head(Q, b, h, qb, qh)
        g0 = GRAD + bh.to(tl.int64) * T * DV
        factor = 1.0
        if HAS_FACTOR:
            factor = tl.load(FACTOR + h)
        xs = scale_of_scores(scale * factor, ACT)
        shift = 0.0
        if HAS_OFFSET:
            shift = tl.load(OFFSET + h)
        if CAUSAL:
            dk, dv = _through_rows(dk, dv, k, v, q0, g0, TOTALS + at, PEAKS + at, PEAK_AT + at, DELTA + at, SUMS + at,
                                   COUNT, seen, qt, lo, free, offset, b, T, S, columns, xs, factor, shift, eps, D, DV,
                                   BD, BDV, BM, ACT, LOGP, TOTAL, CAUSAL, PAD, True, HAS_FACTOR, IP)  # fmt: skip
        dk, dv = _through_rows(dk, dv, k, v, q0, g0, TOTALS + at, PEAKS + at, PEAK_AT + at, DELTA + at, SUMS + at,
                               COUNT, seen, qt, free, rest, offset, b, T, S, columns, xs, factor, shift, eps, D, DV,
                               BD, BDV, BM, ACT, LOGP, TOTAL, CAUSAL, PAD, False, HAS_FACTOR, IP)  # fmt: skip
        dk, dv = _through_rows(dk, dv, k, v, q0, g0, TOTALS + at, PEAKS + at, PEAK_AT + at, DELTA + at, SUMS + at,
                               COUNT, seen, qt, rest, T, offset, b, T, S, columns, xs, factor, shift, eps, D, DV,
                               BD, BDV, BM, ACT, LOGP, TOTAL, CAUSAL, PAD, True, HAS_FACTOR, IP)  # fmt: skip
    if ACT == RELU:
        dv = dv * scale
    store_rows(head(DK, b, hk, db, dh), c0, dt, n, S, d, D, dk * (scale * (1 << LOGP)))
    store_rows(head(DV_, b, hk, eb, eh), c0, et, n, S, e, DV, dv)
