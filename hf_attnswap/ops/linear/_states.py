"""The states between chunks: the sum of each chunk, and the running sums over chunks.

A state is `[F Dv + F]` numbers of float32: S = sum_j phi_j v_j^T, row by row, then z = sum_j phi_j o_j with a number
o_j per token. STATES holds one per text, key/value head and chunk, `[B Hkv, NC, F Dv + F]`. HAS_GATE, what was added
fades as later tokens come: SUMS (`_gates.py`) is `[B Hkv, T]`. Without denominators, a state is S alone.
"""

import triton
import triton.language as tl

from ..tiles import dot, head, load_rows
from ._gates import end_of_chunk, log_sums, remaining, remaining_at
from ._maps import load_features


@triton.jit(do_not_specialize=["KV", "G", "NC", "T"])
def of_chunks(
    X, V, ONES, MASK, SUMS, STATES, xb, xh, xt, vb, vh, vt, KV, G, T, NC, scale,
    F: tl.constexpr, DV: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, MAP: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_ONES: tl.constexpr, HAS_GATE: tl.constexpr, DENOMINATORS: tl.constexpr, BACKWARDS: tl.constexpr,
    C: tl.constexpr, IP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the state of one chunk of C tokens, summed over the G heads that share it; BE of its columns a program.

    X: `[B, KV G, T, F]` before the map. V: `[B, KV G, T, DV]`. ONES: o, `[B, KV G, T]`; 1 unless HAS_ONES. MASK: uint8
    `[B, T]`. What is added is what remains at the end of the chunk, BACKWARDS what the state before it gives the token.
    A grid of (NC, B KV, blocks of BE columns).
    """
    c = tl.program_id(0)
    r = tl.program_id(1)
    b = r // KV
    n = tl.arange(0, BN)
    f = tl.arange(0, BF)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    sums = SUMS + r.to(tl.int64) * T
    s = tl.zeros((BF, BE), tl.float32)
    z = tl.zeros((BF,), tl.float32)
    for i in range(0, G):
        h = (r % KV) * G + i
        x0 = head(X, b, h, xb, xh)
        v0 = head(V, b, h, vb, vh)
        for first in range(c * C, tl.minimum(c * C + C, T), BN):
            phi = load_features(x0, first, xt, n, T, f, scale, MASK + b * T, F, MAP, HAS_MASK)
            if HAS_GATE:
                high, low = log_sums(sums, first + n, T)
                faded = remaining_at(high, low, sums, c, T, C, not BACKWARDS)
                phi = (phi.to(tl.float32) * faded[:, None]).to(phi.dtype)
            s += dot(tl.trans(phi), load_rows(v0, first, vt, n, T, e, DV), IP)
            if not DENOMINATORS:
                pass
            elif HAS_ONES:
                ones = tl.load(ONES + (b * KV * G + h) * T + first + n, mask=first + n < T, other=0.0)
                z += tl.sum(phi.to(tl.float32) * ones[:, None], 0)
            else:
                z += tl.sum(phi.to(tl.float32), 0)
    state = STATES + (r * NC + c).to(tl.int64) * (F * DV + F if DENOMINATORS else F * DV)
    tl.store(state + f[:, None] * DV + e[None, :], s, mask=(f < F)[:, None] & (e < DV)[None, :])
    if DENOMINATORS:
        tl.store(state + F * DV + f, z, mask=f + tl.program_id(2) * F < F)  # by the first program


@triton.jit
def _walked(SUMS, c, NC, T, C: tl.constexpr, BACKWARDS: tl.constexpr):
    """Return L where c chunks lie behind, BACKWARDS those at the end of the text and -L: it falls on the way."""
    if BACKWARDS:
        high, low = end_of_chunk(SUMS, NC - 1 - c, T, C)
        return -high, -low
    else:
        return end_of_chunk(SUMS, c - 1, T, C)


@triton.jit
def _fading(SUMS, c0, NC, T, C: tl.constexpr, BC: tl.constexpr, BACKWARDS: tl.constexpr):
    """Return what remains of what BC chunks add and of what came before them, before each chunk and after the last.

    `[BC, BC]`, `[BC]`, `[BC]` and one number.
    """
    i = tl.arange(0, BC)
    high, low = _walked(SUMS, c0 + i, NC, T, C, BACKWARDS)
    added_high, added_low = _walked(SUMS, c0 + i + 1, NC, T, C, BACKWARDS)
    first_high, first_low = _walked(SUMS, c0, NC, T, C, BACKWARDS)
    last_high, last_low = _walked(SUMS, tl.minimum(c0 + BC, NC), NC, T, C, BACKWARDS)
    over = remaining(high[:, None], low[:, None], added_high[None, :], added_low[None, :])
    kept = remaining(high, low, first_high, first_low)
    added = remaining(last_high, last_low, added_high, added_low)
    remains = remaining(last_high, last_low, first_high, first_low)
    return tl.where(i[:, None] > i[None, :], over, 0.0), kept, added, remains


@triton.jit(do_not_specialize=["NC", "T"])
def running(
    STATES, SUMS, FIRST, LAST, NC, T,
    F: tl.constexpr, DV: tl.constexpr, HAS_GATE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
    BACKWARDS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr,
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
        if HAS_GATE:
            over, kept, added, remains = _fading(SUMS + r.to(tl.int64) * T, c0, NC, T, C, BC, BACKWARDS)
            before = tl.dot(over, x, input_precision="ieee") + kept[:, None] * carry[None, :]
            tl.store(p, before, mask=mask)
            carry = carry * remains + tl.sum(x * added[:, None], 0)
        else:
            tl.store(p, tl.cumsum(x, 0) - x + carry[None, :], mask=mask)
            carry += tl.sum(x, 0)
    if HAS_LAST:
        tl.store(LAST + beside, carry, mask=ok)
