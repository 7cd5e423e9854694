"""Compute the hybrid with torch alone, by tiles of rows in whole chunks.

Softmax goes over the window of each chunk; the state of the keys that leave the window is handed on from tile to tile.
"""

import torch

from ..chunks import from_chunks, to_chunks
from ..heads import compute_dtype
from ..rows import by_rows
from ..sliding import HybridState, Step, context
from ..states import faded, fading, linear_block, linear_step, values_with_ones
from .reference import NO_MASS, log_of_mass, log_scale, one_for_none


def run(
    query, key, value, map_query, map_key, log_mix, scaling, window, sinks, valid, state, keep_state,
    rotation, log_decay,
):  # fmt: skip
    """Return what `hybrid_attention` returns; one token after a state goes by the recurrence. O(n d) memory.

    Takes the arguments of `hybrid_attention` in order.
    """
    at = context(query, key, value, valid, window, sinks, state and state.window)
    dtype = compute_dtype(query.dtype)
    log_decay = None if log_decay is None else log_decay.to(dtype)
    turns = None if rotation is None else at.slots(rotation.turns[:, None], state and state.turns)

    def seen_by_map(x, slots: slice):
        """Return queries or keys in these slots as the maps see them."""
        return x.to(dtype) if rotation is None else rotation.of(turns[:, 0, slots]).undo(x.to(dtype))

    if state is not None:
        S = state.linear.to(dtype)
    else:
        features = map_key(key[:, :, :1].to(dtype)).shape[-1]
        S = key.new_zeros(*key.shape[:2], features, value.shape[-1] + 1, dtype=dtype)
    if isinstance(at, Step):
        leaving_key, leaving_value, leaving = at.leaving()
        x = seen_by_map(query, slice(-1, None))
        features, left_out = map_query.beside_softmax(x)
        k = map_key(seen_by_map(leaving_key, slice(0, 1)))
        k = k if leaving is None else k * leaving[:, None, :, None].to(dtype)
        kept = None if log_decay is None else log_decay.exp()[:, None, None]
        linear, S = linear_step(features, k, leaving_value, S, kept)
        out = _joined(*at.softmax_parts(scaling), linear, log_scale(x, log_mix, left_out))
    else:
        leaving, counted = at.leaving(), at.counted()

        def attend(query, key, value, bias, tile, S):
            """Return the output of one tile, `[B, H, t, Dv]`, and the state after its rows."""
            size, kv_heads, new = at.chunk_of(query), key.shape[1], slice(0, query.shape[2])
            x = seen_by_map(query, slice(tile.rows.start + at.window, tile.rows.stop + at.window))
            features, left_out = map_query.beside_softmax(x)
            k = map_key(seen_by_map(key[:, :, new], tile.rows)) * leaving[:, None, tile.rows, None].to(dtype)
            kept = None
            if log_decay is not None:
                features, k, kept = faded(features, k, *fading(log_decay, counted[:, tile.rows], size))
            in_chunks = (features, k, log_scale(x, log_mix, left_out))
            q, k, scale = (to_chunks(t, kv_heads, size) for t in in_chunks)
            linear, S = linear_block(q, k, values_with_ones(value[:, :, new], size, dtype), S, kept)
            out = _joined(*at.softmax_parts(query, key, value, tile, scaling), linear, scale)
            return (from_chunks(out, query.shape[0], size),), S

        tensors = [at.sink_key, at.sink_value, *map_query.tensors.values(), *map_key.tensors.values(), log_mix]
        tensors += [] if log_decay is None else [log_decay]
        (out,), S = by_rows(attend, at.query, at.key, at.value, at.tiles(), tensors, carry=S.flatten(0, 1))
        out, S = at.unalign(out), S.unflatten(0, key.shape[:2])
    if not keep_state:
        return out.to(query.dtype), None
    return out.to(query.dtype), HybridState(at.state(), S, None if turns is None else at.recent(turns))


def _joined(numerator, denominator, c, linear, log_scale):
    """Return the output of rows, from the parts of both branches.

    Each branch is a mean with the log of its mass; a sigmoid of the difference weighs the means, so nothing overflows.

    Args:
        numerator: `[..., Dv]`, denominator and c: `[..., 1]`, the softmax branch as `Context.softmax_parts` returns it.
        linear: `[..., Dv + 1]`, numerator and denominator of the linear branch.
        log_scale: `[..., 1]`, log of the factor of the linear branch.
    """
    linear_numerator, linear_denominator = linear[..., :-1], linear[..., -1:]
    linear_mass = log_scale + log_of_mass(linear_denominator)
    linear_mass = linear_mass.masked_fill(linear_denominator <= NO_MASS, torch.finfo(c.dtype).min)
    lead = (c + log_of_mass(denominator)).sub(linear_mass)
    out = numerator * (torch.sigmoid(lead) / one_for_none(denominator))
    return torch.addcmul(out, linear_numerator, torch.sigmoid(-lead) / one_for_none(linear_denominator))
