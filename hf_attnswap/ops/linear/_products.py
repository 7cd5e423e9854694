"""The rows of linear attention: what the state before their chunk gives them, and the tokens of their chunk.

With the features phi of queries q and keys k, u_i = g_i / (den_i + eps) for the gradient g_i of row i, and w_i the
gradient of its denominator, all four directions are one of two products:

    by_features   o_i  = sum_{j <= i} (q_i . k_j) v_j            dv_j = sum_{i >= j} (k_j . q_i) u_i
    by_values     dq_i = sum_{j <= i} (u_i . v_j + w_i) k_j      dk_j = sum_{i >= j} (v_j . u_i + w_i) q_i

A program takes BM rows of one head; BACKWARDS the rows are tokens of a key/value head, and the columns those of the G
query heads that share it. STATES (`_states.py`) are of all chunks before the rows' (after it, BACKWARDS). HAS_GATE,
each term counts as what remains of key j at query i: SUMS (`_gates.py`) is `[B Hkv, T]`. Without DENOMINATORS, w is 0
and states are S alone.
"""

import triton
import triton.language as tl

from ..tiles import dot, head, load_columns, load_rows, store_rows
from ._gates import log_sums, remaining_at, remaining_between
from ._maps import load_features, slopes


@triton.jit
def _columns(r0, T, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BACKWARDS: tl.constexpr):
    """Return the tokens of the chunk that the rows r0 to r0 + BM see, from and to."""
    c0 = r0 // C * C
    if BACKWARDS:
        return r0 // BN * BN, tl.minimum(c0 + C, T)
    else:
        return c0, tl.minimum(r0 + BM, T)


@triton.jit
def _state(STATES, r, c, NC, F: tl.constexpr, DV: tl.constexpr, DENOMINATORS: tl.constexpr):
    """Return where the state of chunk c begins."""
    return STATES + (r * NC + c).to(tl.int64) * (F * DV + F if DENOMINATORS else F * DV)


@triton.jit(do_not_specialize=["H", "G", "NC", "T"])
def by_features(
    X, Y, V, MASK, SUMS, STATES, OUT, DEN, NEAR, MASS, xb, xh, xt, yb, yh, yt, vb, vh, vt, ob, oh, ot, H, G, T, NC,
    scale, eps,
    F: tl.constexpr, DV: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, MAP: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_GATE: tl.constexpr, DENOMINATORS: tl.constexpr, HAS_STATES: tl.constexpr, C: tl.constexpr,
    BACKWARDS: tl.constexpr, DIVIDED: tl.constexpr, JOINED: tl.constexpr, IP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Write o and, forwards, the denominators DEN `[B, H, T]`; BACKWARDS dv. BE of the columns a program.

    Without HAS_STATES, what the chunk alone gives.

    JOINED: OUT holds the mean of another branch, NEAR the log of its mass and MASS the log of the factor of this one,
    both `[B, H, T]`; the mean of both is written.
    """
    r = tl.program_id(1)
    heads = H // G if BACKWARDS else H
    b = r // heads
    h = r % heads
    hk = h if BACKWARDS else h // G
    r0 = tl.program_id(0) * BM
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    f = tl.arange(0, BF)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    mask = MASK + b * T  # of keys
    sums = SUMS + (b * (H // G) + hk).to(tl.int64) * T
    x = load_features(head(X, b, h, xb, xh), r0, xt, m, T, f, scale, mask, F, MAP, HAS_MASK and BACKWARDS)
    acc = tl.zeros((BM, BE), tl.float32)
    den = tl.zeros((BM,), tl.float32)
    if HAS_GATE:
        high, low = log_sums(sums, r0 + m, T)
    if HAS_STATES:
        state = _state(STATES, b * (H // G) + hk, r0 // C, NC, F, DV, DENOMINATORS)
        acc = dot(x, load_rows(state, 0, DV, f, F, e, DV).to(x.dtype), IP)
        if DENOMINATORS:
            z = tl.load(state + F * DV + f, mask=f < F, other=0.0)
            den = tl.sum(x.to(tl.float32) * z[None, :], 1)
        if HAS_GATE:
            faded = remaining_at(high, low, sums, r0 // C, T, C, BACKWARDS)
            acc *= faded[:, None]
            den *= faded
    lo, hi = _columns(r0, T, C, BM, BN, BACKWARDS)
    for i in range(0, G if BACKWARDS else 1):
        hy = hk * G + i if BACKWARDS else hk
        y0 = head(Y, b, hy, yb, yh)
        v0 = head(V, b, hy, vb, vh)
        for first in range(lo, hi, BN):
            y = load_features(y0, first, yt, n, T, f, scale, mask, F, MAP, HAS_MASK and not BACKWARDS)
            p = dot(x, tl.trans(y), IP)
            if HAS_GATE:
                p *= remaining_between(high, low, sums, first + n, T, BACKWARDS)
            if BACKWARDS:
                ok = (first + n)[None, :] >= (r0 + m)[:, None]
            else:
                ok = (first + n)[None, :] <= (r0 + m)[:, None]
            p = tl.where(ok, p, 0.0).to(x.dtype)
            den += tl.sum(p.to(tl.float32), 1)
            acc += dot(p, load_rows(v0, first, vt, n, T, e, DV), IP)
    out = head(OUT, b, h, ob, oh)
    if DENOMINATORS and not BACKWARDS:
        at = r * T + r0 + m
        tl.store(DEN + at, den, mask=r0 + m + tl.program_id(2) * T < T)  # by the first program
        if JOINED:
            some = den > 1e-30  # less is none: its reciprocal would overflow
            one = tl.where(some, den, 1.0)
            near = tl.load(NEAR + at, mask=r0 + m < T, other=0.0)
            far = tl.load(MASS + at, mask=r0 + m < T, other=0.0) + tl.log(one)
            share = tl.where(some, 1.0 / (1.0 + tl.exp(far - near)), 1.0)
            acc = acc * ((1.0 - share) / one)[:, None]
            acc += load_rows(out, r0, ot, m, T, e, DV).to(tl.float32) * share[:, None]
        elif DIVIDED:
            acc = acc / (den + eps)[:, None]
    store_rows(out, r0, ot, m, T, e, DV, acc)


@triton.jit(do_not_specialize=["H", "G", "NC", "T"])
def by_values(
    X, Y, K, W, PLACE, MASK, SUMS, STATES, OUT, PASSED, xb, xh, xt, yb, yh, yt, kb, kh, kt, pb, ph, pt, ob, oh, ot, H,
    G, T, NC, scale,
    F: tl.constexpr, DV: tl.constexpr, BE: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_GATE: tl.constexpr, DENOMINATORS: tl.constexpr, C: tl.constexpr, BACKWARDS: tl.constexpr, IP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the gradient of PLACE, where the map stands: dq, or BACKWARDS dk. BF of the features a program.

    X, Y: u and v, BACKWARDS v and u. K: keys before their map, BACKWARDS queries. W: `[B, H, T]`. PASSED: HAS_GATE,
    `[blocks of features, B, heads, T]`, the products of features and their gradients.
    """
    r = tl.program_id(1)
    heads = H // G if BACKWARDS else H
    b = r // heads
    h = r % heads
    hk = h if BACKWARDS else h // G
    r0 = tl.program_id(0) * BM
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    e = tl.arange(0, BE)
    f = tl.program_id(2) * BF + tl.arange(0, BF)
    mask = MASK + b * T  # of keys
    sums = SUMS + (b * (H // G) + hk).to(tl.int64) * T
    x = load_rows(head(X, b, h, xb, xh), r0, xt, m, T, e, DV)
    state = _state(STATES, b * (H // G) + hk, r0 // C, NC, F, DV, DENOMINATORS)
    acc = dot(x, load_columns(state, 0, DV, f, F, e, DV).to(x.dtype), IP)
    w = tl.zeros((BM,), tl.float32)
    if DENOMINATORS:
        z = tl.load(state + F * DV + f, mask=f < F, other=0.0)
        if BACKWARDS:
            acc += z[None, :]
        else:
            w = tl.load(W + r * T + r0 + m, mask=r0 + m < T, other=0.0)
            acc += w[:, None] * z[None, :]
    if HAS_GATE:
        high, low = log_sums(sums, r0 + m, T)
        acc *= remaining_at(high, low, sums, r0 // C, T, C, BACKWARDS)[:, None]
    lo, hi = _columns(r0, T, C, BM, BN, BACKWARDS)
    for i in range(0, G if BACKWARDS else 1):
        hy = hk * G + i if BACKWARDS else hk
        y0 = head(Y, b, hy, yb, yh)
        k0 = head(K, b, hy, kb, kh)
        for first in range(lo, hi, BN):
            p = dot(x, load_columns(y0, first, yt, n, T, e, DV), IP)
            if BACKWARDS:
                of_row = tl.zeros((BN,), tl.float32)
                if DENOMINATORS:
                    of_row = tl.load(W + (b * H + hy) * T + first + n, mask=first + n < T, other=0.0)
                p = tl.where((first + n)[None, :] >= (r0 + m)[:, None], p + of_row[None, :], 0.0)
            else:
                p = tl.where((first + n)[None, :] <= (r0 + m)[:, None], p + w[:, None], 0.0)
            if HAS_GATE:
                p *= remaining_between(high, low, sums, first + n, T, BACKWARDS)
            k = load_features(k0, first, kt, n, T, f, scale, mask, F, MAP, HAS_MASK and not BACKWARDS)
            acc += dot(p.to(k.dtype), k, IP)
    place = head(PLACE, b, h, pb, ph)
    if HAS_GATE:
        phi = load_features(place, r0, pt, m, T, f, scale, mask, F, MAP, HAS_MASK and BACKWARDS).to(tl.float32)
        passed = PASSED + (tl.program_id(2) * tl.num_programs(1) + r).to(tl.int64) * T
        tl.store(passed + r0 + m, tl.sum(acc * phi, 1), mask=r0 + m < T)
    acc = acc * slopes(place, r0, pt, m, T, f, scale, mask, F, MAP, HAS_MASK and BACKWARDS)
    store_rows(head(OUT, b, h, ob, oh), r0, ot, m, T, f, F, acc)


@triton.jit(do_not_specialize=["H", "T"])
def prepare(
    OUT, DEN, GRAD, GRAD_DEN, U, W, ob, oh, ot, gb, gh, gt, H, T, eps,
    DV: tl.constexpr, BE: tl.constexpr, DIVIDED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write u `[B, H, T, DV]` and w `[B, H, T]`, from the output, the denominators and the gradients of both.

    w goes with the u that was rounded: u . v + w may be a small difference of large numbers.
    """
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    r0 = tl.program_id(0) * BM
    m = tl.arange(0, BM)
    e = tl.arange(0, BE)
    ok = r0 + m < T
    at = bh * T + r0 + m
    u = load_rows(head(GRAD, b, h, gb, gh), r0, gt, m, T, e, DV).to(tl.float32)
    w = tl.load(GRAD_DEN + at, mask=ok, other=0.0)
    if DIVIDED:
        u = u / (tl.load(DEN + at, mask=ok, other=1.0) + eps)[:, None]
        if U.dtype.element_ty == tl.float16:
            u = tl.minimum(tl.maximum(u, -60000.0), 60000.0)
        out = load_rows(head(OUT, b, h, ob, oh), r0, ot, m, T, e, DV).to(tl.float32)
        w -= tl.sum(u.to(U.dtype.element_ty).to(tl.float32) * out, 1)
    store_rows(U + bh.to(tl.int64) * T * DV, r0, DV, m, T, e, DV, u)
    tl.store(W + at, w, mask=ok)
