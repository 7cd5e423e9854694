"""Gates: of what a token added, the product g_{j+1} ... g_i remains at token i.

It is 2^(L_i - L_j) with L the running sums of log2 g. L is float64, and enters a difference as two numbers of float32:
a difference of two long sums loses no digits, and a gate of 0, which counts as 2^-2000, costs its neighbours none.
"""

import triton
import triton.language as tl

from ..tiles import LN2, head

_LOWEST = tl.constexpr(-2000.0)


@triton.jit
def log_sums(SUMS, at, length):
    """Return L at the tokens `at` as two numbers, high and low; 0 before the text."""
    x = tl.load(SUMS + at, mask=(at >= 0) & (at < length), other=0.0)
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def remaining(high, low, since_high, since_low):
    """Return what remains from one L to another, at most 1."""
    return tl.exp2(tl.minimum((high - since_high) + (low - since_low), 0.0))


@triton.jit
def end_of_chunk(SUMS, c, T, C: tl.constexpr):
    """Return L after the chunks `c`, as `log_sums` does; 0 after chunk -1."""
    return log_sums(SUMS, tl.minimum(c * C + C, T) - 1, T)


@triton.jit
def remaining_at(high, low, SUMS, c, T, C: tl.constexpr, BACKWARDS: tl.constexpr):
    """Return what remains at tokens of chunk c, with this L, of the state before it; BACKWARDS of them at its end."""
    if BACKWARDS:
        end_high, end_low = end_of_chunk(SUMS, c, T, C)
        return remaining(end_high, end_low, high, low)
    else:
        start_high, start_low = end_of_chunk(SUMS, c - 1, T, C)
        return remaining(high, low, start_high, start_low)


@triton.jit
def remaining_between(high, low, SUMS, columns, T, BACKWARDS: tl.constexpr):
    """Return what remains at rows, with this L, of the tokens `columns`, `[rows, columns]`; BACKWARDS the other way."""
    of_high, of_low = log_sums(SUMS, columns, T)
    if BACKWARDS:
        return remaining(of_high[None, :], of_low[None, :], high[:, None], low[:, None])
    else:
        return remaining(high[:, None], low[:, None], of_high[None, :], of_low[None, :])


@triton.jit(do_not_specialize=["KV", "T"])
def sum_logs(LOGS, SUMS, lb, lh, lt, KV, T, BN: tl.constexpr):
    """Write L `[B KV, T]` of the logs of the gates, LOGS `[B, KV, T]`; a program per text and head."""
    r = tl.program_id(0)
    base = head(LOGS, r // KV, r % KV, lb, lh)
    carry = tl.zeros((1,), tl.float64)
    for first in range(0, T, BN):
        at = first + tl.arange(0, BN)
        x = tl.load(base + at * lt, mask=at < T, other=0.0).to(tl.float64) / LN2
        x = tl.maximum(x, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(SUMS + r.to(tl.int64) * T + at, tl.cumsum(x, 0) + carry, mask=at < T)
        carry += tl.sum(x, 0)


@triton.jit(do_not_specialize=["G", "NC", "T", "of_queries", "of_keys"])
def gradients(
    QUERIES, KEYS, BEFORE, AFTER, OUT, G, NC, T, of_queries, of_keys,
    SIZE: tl.constexpr, C: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the logs of the gates, `[B KV, T]`, for one chunk of C tokens.

    What passes through gate l are the parts of QUERIES `[parts, B KV G, T]` (q_i . dq_i) and KEYS `[parts, B KV, T]`
    (k_i . dk_i) from l to the end of the chunk, the second less, and <S, R> of the state S after the chunk and its
    gradient R: BEFORE and AFTER `[B KV, NC, SIZE]` hold S before and R after each chunk.
    """
    c = tl.program_id(0)
    r = tl.program_id(1)
    rows = tl.num_programs(1)
    at = c * C + tl.arange(0, C)
    passed = tl.zeros((C,), tl.float32)
    for i in range(0, of_queries):
        for j in range(0, G):
            passed += tl.load(QUERIES + ((i * rows + r) * G + j).to(tl.int64) * T + at, mask=at < T, other=0.0)
    for i in range(0, of_keys):
        passed -= tl.load(KEYS + (i * rows + r).to(tl.int64) * T + at, mask=at < T, other=0.0)
    through = tl.zeros((BS,), tl.float32)
    place = (r * NC + c).to(tl.int64) * SIZE
    for first in range(0, tl.where(c + 1 < NC, SIZE, 0), BS):  # nothing follows the last chunk
        e = first + tl.arange(0, BS)
        state = tl.load(BEFORE + place + SIZE + e, mask=e < SIZE, other=0.0)
        through += state * tl.load(AFTER + place + e, mask=e < SIZE, other=0.0)
    out = tl.cumsum(passed, 0, reverse=True) + tl.sum(through, 0)
    tl.store(OUT + r.to(tl.int64) * T + at, out, mask=at < T)
