"""The kernel of the forward pass: each program takes BM rows of one head through the keys, BN at a time.

    o_i = sum_j a(s'_ij) v_j / d_i,   s'_ij = scale f_h q_i . k_j,   d_i = 1, n_i^alpha or sum_j a(s'_ij) + eps

Scores stay in registers; memory is O(n d). Where an activation needs the largest score of its row, the keys are gone
through for it first. Tiles of keys that every row sees are taken without a mask. The sum of the weights is that of the
rounded weights which multiply the values: where one key has nearly all the weight, the output is its value, and the
gradient, a difference between both, is not lost in the rounding.
"""

import triton
import triton.language as tl

from ..tiles import dot, head, load_columns, load_rows, store_rows
from ._activations import EXP, POWER, RELU, UNSHIFTED, row_number, scale_of_scores, weights
from ._rows import allowed, column_phases, counts, key_range


@triton.jit
def _peaks(
    peak, peak_at, q, k0, stride, VALID, lo, hi, positions, start, end, whole, S,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr,
    WHERE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Return the largest product of each row so far, and its key where WHERE."""
    n = tl.arange(0, BN)
    for first in range(lo, hi, BN):
        x = dot(q, load_columns(k0, first, stride, n, S, tl.arange(0, BD), D, not MASKED), IP)
        if MASKED:
            ok = allowed(VALID, (first + n)[None, :], positions[:, None], start, end, whole, CAUSAL, PAD)
            x = tl.where(ok, x, float("-inf"))
        top = tl.max(x, 1)
        if WHERE:
            at = tl.max(tl.where(x == top[:, None], (first + n)[None, :], 0), 1)
            peak_at = tl.where(top > peak, at, peak_at)
        peak = tl.maximum(peak, top)
    return peak, peak_at


@triton.jit
def _sums(
    acc, total, q, k0, v0, stride_k, stride_v, VALID, lo, hi, positions, start, end, whole, ks, row, S,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, ACT: tl.constexpr,
    LOGP: tl.constexpr, CAUSAL: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr, TOTAL: tl.constexpr,
    ASM: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Return the sums of weights times values, and of weights, with the keys from lo to hi added."""
    n = tl.arange(0, BN)
    columns = tl.arange(0, BDV)
    for first in range(lo, hi, BN):
        x = dot(q, load_columns(k0, first, stride_k, n, S, tl.arange(0, BD), D, not MASKED), IP)
        if MASKED:
            ok = allowed(VALID, (first + n)[None, :], positions[:, None], start, end, whole, CAUSAL, PAD)
            x = tl.where(ok, x, float("-inf"))
        a = weights(x, ks, row[:, None], q, ACT, LOGP, ASM)
        if ACT == POWER:  # most tiles far from the largest scores have no weight at all
            if tl.max(tl.max(a.to(tl.float32), 1), 0) > 0:
                total += tl.sum(a.to(tl.float32), 1)
                acc += dot(a, load_rows(v0, first, stride_v, n, S, columns, DV, not MASKED), IP)
        else:
            if TOTAL:
                total += tl.sum(a.to(tl.float32), 1)
            acc += dot(a, load_rows(v0, first, stride_v, n, S, columns, DV, not MASKED), IP)
    return acc, total


@triton.jit(do_not_specialize=["H", "G", "T", "S"])
def forward(
    Q, K, V, OUT, TOTALS, PEAKS, PEAK_AT, OFFSET, FACTOR, VALID, RANGE, COUNT,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, H, G, T, S, scale, alpha, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ACT: tl.constexpr, LOGP: tl.constexpr,
    COUNTED: tl.constexpr, TOTAL: tl.constexpr, CAUSAL: tl.constexpr, PAD: tl.constexpr, LEARNING: tl.constexpr,
    HAS_OFFSET: tl.constexpr, HAS_FACTOR: tl.constexpr, ASM: tl.constexpr, IP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Write the output and, where LEARNING, what the backward pass needs: sums, largest products and their keys.

    Q, K, V, OUT: `[B, heads, tokens, D]` with the strides of batch, head and token. TOTALS, PEAKS, PEAK_AT:
    `[B, H, T]`. OFFSET, FACTOR: `[H]`. A grid of (blocks of rows, B H). What is not used may be any pointer.
    """
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    r0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest rows first
    m = tl.arange(0, BM)
    rows = r0 + m
    offset = S - T
    positions = rows + offset
    start, end, whole = key_range(RANGE, b, S, PAD)
    q = load_rows(head(Q, b, h, qb, qh), r0, qt, m, T, tl.arange(0, BD), D)
    k0 = head(K, b, h // G, kb, kh)
    v0 = head(V, b, h // G, vb, vh)
    valid = VALID + b.to(tl.int64) * S
    lo, free_lo, free_hi, hi = column_phases(r0, offset, start, end, whole, BM, BN, CAUSAL)
    count = counts(COUNT, b, rows, offset, T, S, CAUSAL, PAD)
    ks = scale
    if HAS_FACTOR:
        ks = scale * tl.load(FACTOR + h)
    xs = scale_of_scores(ks, ACT)
    peak = tl.zeros((BM,), tl.float32) - float("inf")
    if (ACT == POWER) or (ACT == UNSHIFTED) or (ACT == EXP):
        at = tl.zeros((BM,), tl.int32)
        WHERE: tl.constexpr = LEARNING and (ACT == POWER)
        if PAD:
            peak, at = _peaks(peak, at, q, k0, kt, valid, lo, free_lo, positions, start, end, whole, S, D, BD, BN,
                              CAUSAL, PAD, True, WHERE, IP)  # fmt: skip
        peak, at = _peaks(peak, at, q, k0, kt, valid, free_lo, free_hi, positions, start, end, whole, S, D, BD, BN,
                          CAUSAL, PAD, False, WHERE, IP)  # fmt: skip
        peak, at = _peaks(peak, at, q, k0, kt, valid, free_hi, hi, positions, start, end, whole, S, D, BD, BN,
                          CAUSAL, PAD, True, WHERE, IP)  # fmt: skip
        # A row that may attend to nothing has no largest score.
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        if LEARNING:
            tl.store(PEAKS + bh * T + rows, peak, mask=rows < T)
            if ACT == POWER:
                tl.store(PEAK_AT + bh * T + rows, at, mask=rows < T)
    shift = 0.0
    if HAS_OFFSET:
        shift = tl.load(OFFSET + h)
    row = row_number(peak, xs, count, shift, ACT)
    acc = tl.zeros((BM, BDV), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if PAD:
        acc, total = _sums(acc, total, q, k0, v0, kt, vt, valid, lo, free_lo, positions, start, end, whole, xs, row, S,
                           D, DV, BD, BDV, BN, ACT, LOGP, CAUSAL, PAD, True, TOTAL, ASM, IP)  # fmt: skip
    acc, total = _sums(acc, total, q, k0, v0, kt, vt, valid, free_lo, free_hi, positions, start, end, whole, xs, row, S,
                       D, DV, BD, BDV, BN, ACT, LOGP, CAUSAL, PAD, False, TOTAL, ASM, IP)  # fmt: skip
    acc, total = _sums(acc, total, q, k0, v0, kt, vt, valid, free_hi, hi, positions, start, end, whole, xs, row, S,
                       D, DV, BD, BDV, BN, ACT, LOGP, CAUSAL, PAD, True, TOTAL, ASM, IP)  # fmt: skip
    if ACT == RELU:  # its weights are those of the products
        acc = acc * ks
        total = total * ks
    if TOTAL:
        if LEARNING:
            tl.store(TOTALS + bh * T + rows, total, mask=rows < T)
        acc = acc / tl.where((eps > 0) | (total > 0), total + eps, 1.0)[:, None]
    if COUNTED:
        acc = acc * tl.exp2(-alpha * tl.log2(count))[:, None]
    store_rows(head(OUT, b, h, ob, oh), r0, ot, m, T, tl.arange(0, BDV), DV, acc)
