"""Where the tiles of a block of rows begin and end, and which keys of a tile a row may attend to.

RANGE holds, for each text, the first key that counts, the one behind the last, and whether all between them count:
int32 `[B, 3]`. VALID says it of each key, uint8 `[B, S]`. COUNT is how many keys each row may attend to, float32
`[B, T]`. Without padding none of the three is read. Row i stands at position i + S - T.
"""

import triton
import triton.language as tl


@triton.jit
def key_range(RANGE, batch, S, PAD: tl.constexpr):
    """Return the first key that counts, the one behind the last, and whether there are none to leave out between."""
    if PAD:
        return tl.load(RANGE + 3 * batch), tl.load(RANGE + 3 * batch + 1), tl.load(RANGE + 3 * batch + 2)
    else:
        return 0, S, 1


@triton.jit
def column_phases(r0, offset, start, end, whole, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """Return where the tiles of the rows r0 to r0 + BM begin, are free of masks (from, to), and end."""
    hi = tl.minimum(end, r0 + BM + offset) if CAUSAL else end
    lo = start // BN * BN
    free_lo = tl.minimum(tl.cdiv(start, BN) * BN, tl.maximum(hi, lo))
    seen_by_all = tl.minimum(end, r0 + offset + 1) if CAUSAL else end
    free_hi = tl.maximum(seen_by_all // BN * BN, free_lo)
    free_hi = tl.where(whole > 0, free_hi, free_lo)
    return lo, free_lo, free_hi, hi


@triton.jit
def allowed(VALID, columns, positions, start, end, whole, CAUSAL: tl.constexpr, PAD: tl.constexpr):
    """Return which columns the rows may attend to: bool, the shapes of `columns` and `positions` broadcast.

    VALID: of the text.
    """
    ok = (columns >= start) & (columns < end)
    if PAD:
        ok = ok & (tl.load(VALID + columns, mask=ok, other=0) != 0)
    if CAUSAL:
        ok = ok & (columns <= positions)
    return ok


@triton.jit
def counts(COUNT, batch, rows, offset, T, S, CAUSAL: tl.constexpr, PAD: tl.constexpr):
    """Return how many keys each row may attend to, at least 1, in float32."""
    if PAD:
        return tl.load(COUNT + batch * T + rows, mask=rows < T, other=1.0)
    elif CAUSAL:
        return tl.maximum(rows + offset + 1, 1).to(tl.float32)
    else:
        return (rows * 0 + S).to(tl.float32)
