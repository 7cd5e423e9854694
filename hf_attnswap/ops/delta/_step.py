"""One token after a state, in one launch: the state fades and takes the token up, and its query heads read it."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["KV", "G"])
def step(
    Q, K, V, BETA, GATE, STATE, AFTER, OUT, qb, qh, kb, kh, vb, vh, bb, bh, gb, gh, KV, G,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """Write the output `[B, H, DV]` and the state after the token; BE of the columns a program.

    Q, K, V: `[B, heads, *]`. BETA: `[B, KV]`; GATE: HAS_GATE, the log of what remains of the state, `[B, KV]`. STATE,
    AFTER: `[B, KV, D, DV]`. A grid of (B KV, blocks of BE columns).
    """
    r = tl.program_id(0)
    b = r // KV
    h = r % KV
    d = tl.arange(0, BD)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    k = tl.load(K + b * kb + h * kh + d, mask=d < D, other=0.0).to(tl.float32)
    v = tl.load(V + b * vb + h * vh + e, mask=e < DV, other=0.0).to(tl.float32)
    at = r.to(tl.int64) * (D * DV) + d[:, None] * DV + e[None, :]
    ok = (d < D)[:, None] & (e < DV)[None, :]
    s = tl.load(STATE + at, mask=ok, other=0.0)
    if HAS_GATE:
        s *= tl.exp(tl.load(GATE + b * gb + h * gh).to(tl.float32))
    u = (v - tl.sum(k[:, None] * s, 0)) * tl.load(BETA + b * bb + h * bh).to(tl.float32)
    s += k[:, None] * u[None, :]
    tl.store(AFTER + at, s, mask=ok)
    for i in range(0, G):
        q = tl.load(Q + b * qb + (h * G + i) * qh + d, mask=d < D, other=0.0).to(tl.float32)
        out = OUT + (r * G + i) * DV + e
        tl.store(out, tl.sum(q[:, None] * s, 0).to(OUT.dtype.element_ty), mask=e < DV)
