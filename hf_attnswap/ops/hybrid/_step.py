"""One token after a state, in one launch: the window takes it in, the token that leaves enters the linear state.

The parts are those of the steps of the ops `window` and `linear`; each query head then weighs the two means by their
masses.
"""

import triton
import triton.language as tl

from ..linear._step import HEDGEHOG, features_of_one, mixed
from ..tiles import LOG2E
from ..window._step import attend


@triton.jit
def _of_query(base, delta, d, D: tl.constexpr, MAP: tl.constexpr):
    """Return the features of a query beside a softmax, both halves for hedgehog, and the log left out of them."""
    if MAP == HEDGEHOG:
        ok = d < D
        y = mixed(base, delta, d, D)
        left = tl.max(tl.abs(y), 0)
        f = tl.where(ok, tl.exp2((y - left) * LOG2E), 0.0)
        g = tl.where(ok, tl.exp2((-y - left) * LOG2E), 0.0)
        return f, g, left
    else:
        f = features_of_one(base, delta, 1.0, d, D, MAP, False)
        return f, f, tl.max(f, 0) * 0.0


@triton.jit(do_not_specialize=["KV", "G", "slots"])
def step(
    Q, K, V, OLD_K, OLD_V, COUNT, NEW_K, NEW_V, OUT, DELTA_Q, DELTA_K, MIX, DECAY, STATE, AFTER, qb, qh, kb, kh, vb, vh,
    KV, G, slots, now, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, SINKS: tl.constexpr, MAP: tl.constexpr,
    HAS_DECAY: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the output and both states with the token; BE columns a program, a grid of (B KV, column blocks).

    MIX: `[H]`, the log of g. DECAY: HAS_DECAY, `[KV]`, the log of d. All else as the steps of the ops `window` and
    `linear` take it.
    """
    r = tl.program_id(0)
    b = r // KV
    h = r % KV
    d = tl.arange(0, BD)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    F: tl.constexpr = 2 * D if MAP == HEDGEHOG else D
    count = tl.load(COUNT + b).to(tl.int32)
    at = r.to(tl.int64)
    old_k = OLD_K + at * slots * D
    old_v = OLD_V + at * slots * DV
    # The oldest token beside the sinks leaves, where the window is full of tokens.
    leaves = tl.where((now <= slots) & (count >= now), 1.0, 0.0)
    v = tl.load(old_v + SINKS * DV + e, mask=e < DV, other=0.0).to(tl.float32)
    v = tl.where(e == DV, 1.0, v)
    kept = 1.0
    if HAS_DECAY:
        kept = tl.exp(tl.load(DECAY + h).to(tl.float32))
    delta = DELTA_K + h * D * D
    place = at * F * (DV + 1) + d[:, None] * (DV + 1) + e[None, :]
    ok = (d < D)[:, None] & (e < DV + 1)[None, :]
    of_z = at * F * (DV + 1) + d * (DV + 1) + DV
    phi = features_of_one(old_k + SINKS * D, delta, 1.0, d, D, MAP, False) * leaves
    s = tl.load(STATE + place, mask=ok, other=0.0) * kept + phi[:, None] * v[None, :]
    z = tl.load(STATE + of_z, mask=d < D, other=0.0) * kept + phi
    tl.store(AFTER + place, s, mask=ok)
    s2 = s
    z2 = z
    if MAP == HEDGEHOG:
        phi = features_of_one(old_k + SINKS * D, delta, 1.0, d, D, MAP, True) * leaves
        s2 = tl.load(STATE + D * (DV + 1) + place, mask=ok, other=0.0) * kept + phi[:, None] * v[None, :]
        z2 = tl.load(STATE + D * (DV + 1) + of_z, mask=d < D, other=0.0) * kept + phi
        tl.store(AFTER + D * (DV + 1) + place, s2, mask=ok)
    for i in range(0, G):
        head = h * G + i
        query = Q + b * qb + head * qh
        q = tl.load(query + d, mask=d < D, other=0.0).to(tl.float32)
        first = tl.where(i == 0, 1, 0)
        near, lse = attend(q, old_k, K + b * kb + h * kh, NEW_K + at * now * D, old_v, V + b * vb + h * vh,
                           NEW_V + at * now * DV, count, now, slots + 1 - now, e, scale,
                           tl.where(tl.program_id(1) == 0, first, 0), first, SINKS, D, DV, BD, BE, BN)  # fmt: skip
        f, g, left = _of_query(query, DELTA_Q + head * D * D, d, D, MAP)
        far = tl.sum(f[:, None] * s, 0)
        den = tl.sum(f * z, 0)
        if MAP == HEDGEHOG:
            far += tl.sum(g[:, None] * s2, 0)
            den += tl.sum(g * z2, 0)
        some = den > 1e-30  # less is none: its reciprocal would overflow
        one = tl.where(some, den, 1.0)
        mass = tl.load(MIX + head).to(tl.float32) + left + tl.log(one)
        share = tl.where(some, 1.0 / (1.0 + tl.exp(mass - lse)), 1.0)
        o = near * share + far * ((1.0 - share) / one)
        tl.store(OUT + (b * KV * G + head) * DV + e, o.to(OUT.dtype.element_ty), mask=e < DV)
