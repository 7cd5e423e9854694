"""What a chunk of the delta rule is made of before any state is known.

With f_i, what remains of the state before the chunk at token i, and D_ij, what remains at i of what token j added,

    U = (I + N)^-1 beta (V - f K S) = (I + N)^-1 beta V - W S,   W = (I + N)^-1 beta f K,
    N = strictly lower part of beta (D * K K^T)                                    (S: state before the chunk)

(Yang et al., "Parallelizing linear transformers with the delta rule over sequence length", 2024).
"""

import triton
import triton.language as tl

from ..linear._gates import log_sums, remaining_at, remaining_between
from ..tiles import dot, head, load_rows, store_rows


@triton.jit
def _inverse(n, i, C: tl.constexpr):
    """Return (I + n)^-1 of a strictly lower `[C, C]`, row by row: the powers of n would leave the range of float32."""
    a = -n
    for row in range(1, C):
        at = (i == row)[:, None]
        x = tl.sum(tl.where(at, a, 0.0), 0)
        a = tl.where(at, (x + tl.sum(x[:, None] * a, 0))[None, :], a)
    return tl.where(i[:, None] == i[None, :], 1.0, a)


@triton.jit(do_not_specialize=["KV", "T"])
def prepare(
    K, V, BETA, SUMS, INVERSE, W, U, kb, kh, kt, vb, vh, vt, bb, bh, bt, KV, T,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, HAS_GATE: tl.constexpr, C: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Write the inverse `[B KV, T, C]`, W `[B KV, T, D]` and beta V times the inverse, U `[B KV, T, DV]`, of a chunk.

    BETA: `[B, KV, T]`. A grid of (chunks, B KV).
    """
    c = tl.program_id(0)
    r = tl.program_id(1)
    b = r // KV
    h = r % KV
    i = tl.arange(0, C)
    d = tl.arange(0, BD)
    at = c * C + i
    key = head(K, b, h, kb, kh)
    value = head(V, b, h, vb, vh)
    sums = SUMS + r.to(tl.int64) * T
    beta = tl.load(head(BETA, b, h, bb, bh) + at * bt, mask=at < T, other=0.0).to(tl.float32)
    n = tl.zeros((C, C), tl.float32)
    for d0 in range(0, D, BD):
        k = load_rows(key, c * C, kt, i, T, d0 + d, D)
        n += dot(k, tl.trans(k), IP)
    of_keys = beta
    if HAS_GATE:
        high, low = log_sums(sums, at, T)
        n *= remaining_between(high, low, sums, at, T, False)
        of_keys *= remaining_at(high, low, sums, c, T, C, False)
    a = _inverse(tl.where(i[:, None] > i[None, :], n * beta[:, None], 0.0), i, C)
    first = r.to(tl.int64) * T
    store_rows(INVERSE + first * C, c * C, C, i, T, i, C, a)
    for d0 in range(0, D, BD):
        k = load_rows(key, c * C, kt, i, T, d0 + d, D).to(tl.float32) * of_keys[:, None]
        store_rows(W + first * D, c * C, D, i, T, d0 + d, D, dot(a, k, IP))
    for e0 in range(0, DV, BD):
        v = load_rows(value, c * C, vt, i, T, e0 + d, DV).to(tl.float32) * beta[:, None]
        store_rows(U + first * DV, c * C, DV, i, T, e0 + d, DV, dot(a, v, IP))
