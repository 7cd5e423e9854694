"""One token after a state, in one launch: it enters the window, the oldest leaves, and the heads of its group attend.

The slots of a state are the sinks, then the last tokens (`sliding.WindowState`). A slot of the window counts where its
position, `COUNT - (now - 1 - slot)`, is not one of a sink; the slot of a sink counts from its position on.
"""

import triton
import triton.language as tl

from ..tiles import LN2, LOG2E


@triton.jit
def _slots(
    OLD, NEW, PUSHED, write, first, count, now, dropped, columns,
    SINKS: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return a tile of the slots after the token, and write it to PUSHED where `write` is 1.

    OLD, PUSHED: slots of the head, contiguous. NEW: the token. now: slots that PUSHED has.
    """
    slot = first + tl.arange(0, BN)
    inside = (columns < WIDTH)[None, :]
    fresh = (slot == now - 1) | ((slot < SINKS) & (slot == count))
    source = tl.where(slot < SINKS, slot, slot + dropped)
    ok = (slot < now)[:, None] & inside
    written = (slot < now * write)[:, None] & inside
    x = tl.load(OLD + source[:, None] * WIDTH + columns[None, :], mask=ok & (slot != now - 1)[:, None], other=0.0)
    new = tl.load(NEW + columns, mask=columns < WIDTH, other=0.0).to(x.dtype)
    x = tl.where(fresh[:, None], new[None, :], x)
    tl.store(PUSHED + slot[:, None] * WIDTH + columns[None, :], x, mask=written)
    return x


@triton.jit
def attend(
    query, OLD_K, K, NEW_K, OLD_V, V, NEW_V, count, now, dropped, e, scale, write_k, write_v,
    SINKS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return the output of one query in the columns e, and lse; write the slots where `write_k`, `write_v` are 1."""
    d = tl.arange(0, BD)
    top = -float("inf")
    den = 0.0
    acc = tl.zeros((BE,), tl.float32)
    for first in range(0, now, BN):
        slot = first + tl.arange(0, BN)
        k = _slots(OLD_K, K, NEW_K, write_k, first, count, now, dropped, d, SINKS, D, BN)
        v = _slots(OLD_V, V, NEW_V, write_v, first, count, now, dropped, e, SINKS, DV, BN)
        counts = tl.where(slot < SINKS, count >= slot, count + slot >= now - 1 + SINKS) & (slot < now)
        s = tl.sum(k.to(tl.float32) * query[None, :], 1) * (scale * LOG2E)
        s = tl.where(counts, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe)
        kept = tl.exp2(top - safe)
        acc = acc * kept + tl.sum(p[:, None] * v.to(tl.float32), 0)
        den = den * kept + tl.sum(p, 0)
        top = new
    return acc / den, (top + tl.log2(den)) * LN2


@triton.jit(do_not_specialize=["H", "G", "slots"])
def step(
    Q, K, V, OLD_K, OLD_V, COUNT, NEW_K, NEW_V, OUT, qb, qh, kb, kh, vb, vh, KV, G, slots, now, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, SINKS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the output `[B, H, DV]` and the state with the token; a grid of (B KV, blocks of BE columns).

    OLD_K: `[B, KV, slots, D]`; NEW_K: `[B, KV, now, D]`; the values alike.
    """
    r = tl.program_id(0)
    b = r // KV
    h = r % KV
    d = tl.arange(0, BD)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    count = tl.load(COUNT + b).to(tl.int32)
    at = r.to(tl.int64)
    for i in range(0, G):
        q = tl.load(Q + b * qb + (h * G + i) * qh + d, mask=d < D, other=0.0).to(tl.float32)
        first = tl.where(i == 0, 1, 0)
        o, _ = attend(q, OLD_K + at * slots * D, K + b * kb + h * kh, NEW_K + at * now * D, OLD_V + at * slots * DV,
                      V + b * vb + h * vh, NEW_V + at * now * DV, count, now, slots + 1 - now, e, scale,
                      tl.where(tl.program_id(1) == 0, first, 0), first, SINKS, D, DV, BD, BE, BN)  # fmt: skip
        tl.store(OUT + (b * KV * G + h * G + i) * DV + e, o.to(OUT.dtype.element_ty), mask=e < DV)
