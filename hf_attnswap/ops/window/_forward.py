"""The kernel of the forward pass: BM rows of one head over the sinks, then over the slots of their windows.

    o_i = sum_{j in W_i} e^{s_ij} v_j / sum_{j in W_i} e^{s_ij},   lse_i = log of that sum,   s_ij = scale q_i . k_j

Row i has its own key at slot i + AHEAD; the slots (i + AHEAD - w, i + AHEAD] are its window. The token of slot u stands
at position u - AHEAD + COUNT, COUNT `[B]` the tokens that came before; positions below the number of sinks count as
sinks, which stand in tensors of their own, `[B, Hkv, m, *]`. The sums take the weights as rounded for the products.
"""

import triton
import triton.language as tl

from ..tiles import LN2, LOG2E, dot, head, load_columns, load_rows, store_rows


@triton.jit
def position_of_first(COUNT, b, HAS_COUNT: tl.constexpr):
    """Return the position of row 0."""
    if HAS_COUNT:
        return tl.load(COUNT + b).to(tl.int32)
    else:
        return 0


@triton.jit
def in_window(slots, rows, before, ahead, length, window, sinks):
    """Return which slots are in the windows of which rows; the shapes of both broadcast."""
    near = (slots <= rows + ahead) & (slots > rows + ahead - window) & (slots < length)
    return near & (slots - ahead + before >= sinks)


@triton.jit
def _added(acc, den, top, s, v, like, IP: tl.constexpr):
    """Return the sums, and the largest score so far, with a tile of scores (times log2 e) and its values added."""
    new = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - safe[:, None]).to(like.dtype)
    kept = tl.exp2(top - safe)
    return acc * kept[:, None] + dot(p, v, IP), den * kept + tl.sum(p.to(tl.float32), 1), new


@triton.jit(do_not_specialize=["H", "G", "T", "S"])
def forward(
    Q, K, V, SINK_K, SINK_V, COUNT, OUT, LSE,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ab, ah, at, cb, ch, ct, ob, oh, ot, H, G, T, S, scale, window, ahead,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, SINKS: tl.constexpr, BS: tl.constexpr,
    HAS_COUNT: tl.constexpr, IP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the output and LSE `[B, H, T]`; a grid of (blocks of rows, B H). S: slots of K and V."""
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    r0 = tl.program_id(0) * BM
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    d = tl.arange(0, BD)
    e = tl.arange(0, BDV)
    rows = r0 + m
    before = position_of_first(COUNT, b, HAS_COUNT)
    q = load_rows(head(Q, b, h, qb, qh), r0, qt, m, T, d, D)
    k0 = head(K, b, h // G, kb, kh)
    v0 = head(V, b, h // G, vb, vh)
    acc = tl.zeros((BM, BDV), tl.float32)
    den = tl.zeros((BM,), tl.float32)
    top = tl.zeros((BM,), tl.float32) - float("inf")
    if SINKS > 0:
        j = tl.arange(0, BS)
        sink_k = load_columns(head(SINK_K, b, h // G, ab, ah), 0, at, j, SINKS, d, D)
        sink_v = load_rows(head(SINK_V, b, h // G, cb, ch), 0, ct, j, SINKS, e, DV)
        begun = (j < SINKS)[None, :] & (j[None, :] <= (rows + before)[:, None])
        of_sinks = tl.where(begun, dot(q, sink_k, IP) * (scale * LOG2E), float("-inf"))
        acc, den, top = _added(acc, den, top, of_sinks, sink_v, q, IP)
    lo = tl.maximum(r0 + ahead - window + 1, 0) // BN * BN
    for first in range(lo, tl.minimum(r0 + BM + ahead, S), BN):
        k = load_columns(k0, first, kt, n, S, d, D)
        see = in_window((first + n)[None, :], rows[:, None], before, ahead, S, window, SINKS)
        s = tl.where(see, dot(q, k, IP) * (scale * LOG2E), float("-inf"))
        acc, den, top = _added(acc, den, top, s, load_rows(v0, first, vt, n, S, e, DV), q, IP)
    some = den > 0
    one = tl.where(some, den, 1.0)
    lse = tl.where(some, (top + tl.log2(one)) * LN2, float("-inf"))
    tl.store(LSE + bh * T + rows, lse, mask=rows < T)
    store_rows(head(OUT, b, h, ob, oh), r0, ot, m, T, e, DV, acc / one[:, None])
