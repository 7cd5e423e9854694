"""The states between chunks: the sum of each chunk, and the running sums over chunks.

A state is `[F Dv + F]` numbers of float32: S = sum_j phi_j v_j^T, row by row, then z = sum_j phi_j o_j with a number
o_j per token. STATES holds one per text, key/value head and chunk, `[B Hkv, NC, F Dv + F]`.
"""

import triton
import triton.language as tl

from ..tiles import dot, head, load_rows
from ._maps import load_features


@triton.jit(do_not_specialize=["KV", "G", "NC", "T"])
def of_chunks(
    X, V, ONES, MASK, STATES, xb, xh, xt, vb, vh, vt, KV, G, T, NC, scale,
    F: tl.constexpr, DV: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, MAP: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_ONES: tl.constexpr, C: tl.constexpr, IP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the state of one chunk of C tokens, summed over the G heads that share it; BE of its columns a program.

    X: `[B, KV G, T, F]` before the map. V: `[B, KV G, T, DV]`. ONES: o, `[B, KV G, T]`; 1 unless HAS_ONES. MASK: uint8
    `[B, T]`. A grid of (NC, B KV, blocks of BE columns).
    """
    c = tl.program_id(0)
    r = tl.program_id(1)
    b = r // KV
    n = tl.arange(0, BN)
    f = tl.arange(0, BF)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    s = tl.zeros((BF, BE), tl.float32)
    z = tl.zeros((BF,), tl.float32)
    for i in range(0, G):
        h = (r % KV) * G + i
        x0 = head(X, b, h, xb, xh)
        v0 = head(V, b, h, vb, vh)
        for first in range(c * C, tl.minimum(c * C + C, T), BN):
            phi = load_features(x0, first, xt, n, T, f, scale, MASK + b * T, F, MAP, HAS_MASK)
            s += dot(tl.trans(phi), load_rows(v0, first, vt, n, T, e, DV), IP)
            if HAS_ONES:
                ones = tl.load(ONES + (b * KV * G + h) * T + first + n, mask=first + n < T, other=0.0)
                z += tl.sum(phi.to(tl.float32) * ones[:, None], 0)
            else:
                z += tl.sum(phi.to(tl.float32), 0)
    state = STATES + (r * NC + c).to(tl.int64) * (F * DV + F)
    tl.store(state + f[:, None] * DV + e[None, :], s, mask=(f < F)[:, None] & (e < DV)[None, :])
    tl.store(state + F * DV + f, z, mask=f + tl.program_id(2) * F < F)  # by the first program


@triton.jit(do_not_specialize=["NC"])
def running(
    STATES, FIRST, LAST, NC,
    F: tl.constexpr, DV: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, BACKWARDS: tl.constexpr,
    BC: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Replace the state of each chunk by the sum of FIRST and those of the chunks before it (after it, BACKWARDS).

    FIRST and LAST, the sum of all: `[B Hkv, F, DV + 1]`, z as last column.
    """
    r = tl.program_id(1)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    ok = e < F * DV + F
    # Where the number stands among rows with z as last column.
    beside = r.to(tl.int64) * (F * DV + F) + tl.where(e < F * DV, e + e // DV, (e - F * DV) * (DV + 1) + DV)
    carry = tl.zeros((BE,), tl.float32)
    if HAS_FIRST:
        carry = tl.load(FIRST + beside, mask=ok, other=0.0)
    for c0 in range(0, NC, BC):
        c = c0 + tl.arange(0, BC)
        at = NC - 1 - c if BACKWARDS else c
        p = STATES + (r * NC + at).to(tl.int64)[:, None] * (F * DV + F) + e[None, :]
        mask = (c < NC)[:, None] & ok[None, :]
        x = tl.load(p, mask=mask, other=0.0)
        tl.store(p, tl.cumsum(x, 0) - x + carry[None, :], mask=mask)
        carry += tl.sum(x, 0)
    if HAS_LAST:
        tl.store(LAST + beside, carry, mask=ok)
