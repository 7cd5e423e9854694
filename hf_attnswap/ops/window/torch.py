"""Compute window attention with torch alone, on any device.

Rows go by chunks, each over its tokens and the w before them, in blocks that fit a cache.
"""

from ..chunks import from_chunks
from ..rows import by_rows
from ..sliding import Step, context


def run(query, key, value, scaling, window, sinks, valid, state, keep_state, reach):
    """Return what `window_attention` returns; one token after a state goes in few kernels. O(n d) memory.

    Takes the arguments of `window_attention` in order.
    """
    at = context(query, key, value, valid, window, sinks, state, reach)
    if isinstance(at, Step):
        numerator, denominator, _ = at.softmax_parts(scaling)
        out = numerator / denominator
    else:

        def attend(query, key, value, bias, tile, carry):
            """Return the output of one tile, `[B, H, t, Dv]`."""
            numerator, denominator, _ = at.softmax_parts(query, key, value, tile, scaling)
            # Every valid row sees itself, so its denominator is at least 1.
            out = numerator / denominator.clamp(min=1)
            return (from_chunks(out, query.shape[0], at.chunk_of(query)),), carry

        (out,), _ = by_rows(attend, at.query, at.key, at.value, at.tiles(), (at.sink_key, at.sink_value))
        out = at.unalign(out)
    return out.to(query.dtype), at.state() if keep_state else None
