"""One token after a state, in one launch: the state takes the token up, and the query heads of its group read it."""

import triton
import triton.language as tl

from ..tiles import LOG2E
from ._maps import ELU, RELU

HEDGEHOG = tl.constexpr(3)


@triton.jit
def mixed(base, delta, d, D: tl.constexpr):
    """Return y = x + x delta of one token, `[BD]`."""
    ok = d < D
    x = tl.load(base + d, mask=ok, other=0.0).to(tl.float32)
    w = tl.load(delta + d[:, None] * D + d[None, :], mask=ok[:, None] & ok[None, :], other=0.0).to(tl.float32)
    return x + tl.sum(x[:, None] * w, 0)


@triton.jit
def _softmax(y, ok):
    y = tl.where(ok, y, float("-inf"))
    e = tl.exp2((y - tl.max(y, 0)) * LOG2E)
    return e / tl.sum(e, 0)


@triton.jit
def features_of_one(base, delta, scale, d, D: tl.constexpr, MAP: tl.constexpr, SECOND: tl.constexpr):
    """Return the features of one token, `[BD]`: those of y or, SECOND, the other half of hedgehog's, those of -y."""
    ok = d < D
    if MAP == HEDGEHOG:
        y = mixed(base, delta, d, D) * scale
        if SECOND:
            y = -y
        return _softmax(y, ok)
    else:
        x = tl.load(base + d, mask=ok, other=0.0).to(tl.float32) * scale
        if MAP == ELU:
            x = tl.exp2(tl.minimum(x, 0.0) * LOG2E) + tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        elif MAP == RELU:
            x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return tl.where(ok, x, 0.0)


@triton.jit(do_not_specialize=["KV", "G"])
def step(
    Q, K, V, DELTA_Q, DELTA_K, MASK, GATE, STATE, AFTER, OUT, DEN, qb, qh, kb, kh, vb, vh, gb, gh, KV, G, scale, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, MAP: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_GATE: tl.constexpr, DIVIDED: tl.constexpr,
):  # fmt: skip
    """Write the output `[B, H, DV]`, the denominators `[B, H]` and the state after the token; BE columns a program.

    Q, K, V: `[B, heads, D]`. GATE: HAS_GATE, the log of what remains of the state, `[B, KV]`. STATE, AFTER:
    `[B, KV, F, DV + 1]`, F = 2 D for hedgehog. A grid of (B KV, column blocks).
    """
    r = tl.program_id(0)
    b = r // KV
    h = r % KV
    d = tl.arange(0, BD)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    F: tl.constexpr = 2 * D if MAP == HEDGEHOG else D
    v = tl.load(V + b * vb + h * vh + e, mask=e < DV, other=0.0).to(tl.float32)
    v = tl.where(e == DV, 1.0, v)
    key = K + b * kb + h * kh
    delta = DELTA_K + h * D * D
    trace = 1.0
    if HAS_MASK:
        trace = tl.load(MASK + b).to(tl.float32)
    kept = 1.0
    if HAS_GATE:
        kept = tl.where(trace > 0, tl.exp(tl.load(GATE + b * gb + h * gh).to(tl.float32)), 1.0)
    at = r.to(tl.int64) * F * (DV + 1) + d[:, None] * (DV + 1) + e[None, :]
    ok = (d < D)[:, None] & (e < DV + 1)[None, :]
    z_at = r.to(tl.int64) * F * (DV + 1) + d * (DV + 1) + DV
    phi = features_of_one(key, delta, scale, d, D, MAP, False) * trace
    s = tl.load(STATE + at, mask=ok, other=0.0) * kept + phi[:, None] * v[None, :]
    z = tl.load(STATE + z_at, mask=d < D, other=0.0) * kept + phi
    tl.store(AFTER + at, s, mask=ok)
    s2 = s
    z2 = z
    if MAP == HEDGEHOG:
        phi = features_of_one(key, delta, scale, d, D, MAP, True) * trace
        s2 = tl.load(STATE + D * (DV + 1) + at, mask=ok, other=0.0) * kept + phi[:, None] * v[None, :]
        z2 = tl.load(STATE + D * (DV + 1) + z_at, mask=d < D, other=0.0) * kept + phi
        tl.store(AFTER + D * (DV + 1) + at, s2, mask=ok)
    for i in range(0, G):
        head = h * G + i
        query = Q + b * qb + head * qh
        phi = features_of_one(query, DELTA_Q + head * D * D, scale, d, D, MAP, False)
        o = tl.sum(phi[:, None] * s, 0)
        den = tl.sum(phi * z, 0)
        if MAP == HEDGEHOG:
            phi = features_of_one(query, DELTA_Q + head * D * D, scale, d, D, MAP, True)
            o += tl.sum(phi[:, None] * s2, 0)
            den += tl.sum(phi * z2, 0)
        if DIVIDED:
            o = o / (den + eps)
        place = b * KV * G + head
        tl.store(OUT + place * DV + e, o.to(OUT.dtype.element_ty), mask=e < DV)
        if tl.program_id(1) == 0:
            tl.store(DEN + place, den)
