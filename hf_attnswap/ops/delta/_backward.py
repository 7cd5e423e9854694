"""What the correction of the values gives to keys, values and beta, where dU is known.

dX    = (I + N)^-T dU               (X = beta (V - f K S), U = (I + N)^-1 X)
dN    = strictly lower part of -dX U^T,   M = beta (D * dN)
dv    = beta dX
dbeta = dX . (V - f K S) + the sums over the rows of dN * D * K K^T
dk    = what the rows and the state give - beta f dX S^T + (M + M^T) k
"""

import triton
import triton.language as tl

from ..linear._gates import log_sums, remaining_at, remaining_between
from ..tiles import dot, head, load_columns, load_rows, store_rows


@triton.jit(do_not_specialize=["KV", "T", "NC"])
def of_corrections(
    K, V, BETA, SUMS, INVERSE, U, DU, STATES, DK, DV_OUT, DBETA, PASSED,
    kb, kh, kt, vb, vh, vt, bb, bh, bt, gb, gh, gt, wb, wh, wt, KV, T, NC,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, HAS_GATE: tl.constexpr, C: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Write dv to DV_OUT and dbeta `[B KV, T]`, add to DK; all of one chunk. A grid of (chunks, B KV).

    U, DU: `[B KV, T, DV]`. PASSED, where HAS_GATE: `[B KV, T]`, of which what passes forwards through the gates is
    taken away.
    """
    c = tl.program_id(0)
    r = tl.program_id(1)
    b = r // KV
    h = r % KV
    i = tl.arange(0, C)
    d = tl.arange(0, BD)
    at = c * C + i
    first = r.to(tl.int64) * T
    value = head(V, b, h, vb, vh)
    grad_value = head(DV_OUT, b, h, wb, wh)
    state = STATES + (r * NC + c).to(tl.int64) * (D * DV)
    beta = tl.load(head(BETA, b, h, bb, bh) + at * bt, mask=at < T, other=0.0).to(tl.float32)
    a = load_rows(INVERSE + first * C, c * C, C, i, T, i, C)
    of_state = tl.zeros((C, BD), tl.float32)
    dn = tl.zeros((C, C), tl.float32)
    dbeta = tl.zeros((C,), tl.float32)
    for e0 in range(0, DV, BE):
        e = e0 + tl.arange(0, BE)
        du = load_rows(DU + first * DV, c * C, DV, i, T, e, DV).to(tl.float32)
        dx = dot(tl.trans(a), du, IP)
        dbeta += tl.sum(dx * load_rows(value, c * C, vt, i, T, e, DV).to(tl.float32), 1)
        store_rows(grad_value, c * C, wt, i, T, e, DV, dx * beta[:, None])
        u = load_rows(U + first * DV, c * C, DV, i, T, e, DV)
        dx = dx.to(u.dtype)
        dn -= dot(dx, tl.trans(u), IP)
        of_state += dot(dx, load_columns(state, 0, DV, d, D, e, DV).to(u.dtype), IP)
    k = load_rows(head(K, b, h, kb, kh), c * C, kt, i, T, d, D)
    dn = tl.where(i[:, None] > i[None, :], dn, 0.0)
    if HAS_GATE:
        high, low = log_sums(SUMS + first, at, T)
        dn *= remaining_between(high, low, SUMS + first, at, T, False)
        of_state *= remaining_at(high, low, SUMS + first, c, T, C, False)[:, None]
    dbeta += tl.sum(dn * dot(k, tl.trans(k), IP), 1) - tl.sum(k.to(tl.float32) * of_state, 1)
    tl.store(DBETA + first + at, dbeta, mask=at < T)
    m = (dn * beta[:, None]).to(k.dtype)
    forwards = dot(m, k, IP) - of_state * beta[:, None]
    passed = tl.sum(k.to(tl.float32) * forwards, 1)
    backwards = dot(tl.trans(m), k, IP)
    passed -= tl.sum(k.to(tl.float32) * backwards, 1)
    grad = head(DK, b, h, gb, gh)
    dk = load_rows(grad, c * C, gt, i, T, d, D).to(tl.float32) + forwards + backwards
    store_rows(grad, c * C, gt, i, T, d, D, dk)
    if HAS_GATE:
        passed = tl.load(PASSED + first + at, mask=at < T, other=0.0) - passed
        tl.store(PASSED + first + at, passed, mask=at < T)
