"""Compute the hybrid on a GPU by the Triton kernels of the ops `window` and `linear`, and one token in one launch.

The rows of the linear branch join the softmax as they are written; where a gradient is wanted, torch joins the two. The
kernels pass Triton's interpreter and compile for sm_80 and sm_90.
"""

import torch

from ... import native
from .. import gpu
from ..linear import triton as linear
from ..sliding import HybridState, WindowState, context
from ..window import triton as window_form
from . import torch as portable
from ._joined import joined

devices = gpu.DEVICES
dtypes = gpu.DTYPES
available = gpu.missing


def unfit(
    query, key, value, map_query, map_key, log_mix, scaling, window, sinks, valid, state, keep_state,
    rotation, log_decay,
):  # fmt: skip
    """Return why the kernels cannot serve the call, in words, or None."""
    reason = window_form.unfit(query, key, value, scaling, window, sinks, valid, state, keep_state, None)
    return reason or linear.unfit(query, key, value, map_query, map_key, 1.0, valid, state, None, 64, True, log_decay)


def run(
    query, key, value, map_query, map_key, log_mix, scaling, window, sinks, valid, state, keep_state,
    rotation, log_decay,
):  # fmt: skip
    """Return what `hybrid_attention` returns; takes its arguments in order."""
    maps = map_query, map_key
    number = linear.number_of(*maps)
    if query.shape[2] == 1 and valid is None and state is not None and not torch.is_grad_enabled():
        if (
            rotation is None
            and number is not None
            and window_form.fits_step(query, key, value, valid, window, sinks, state.window)
        ):
            return _step(query, key, value, *maps, number, log_mix, scaling, window, sinks, state, log_decay)
        return portable.run(
            query, key, value, *maps, log_mix, scaling, window, sinks, valid, state, keep_state, rotation, log_decay
        )
    at = context(query, key, value, valid, window, sinks, state and state.window)
    turns = None if rotation is None else at.slots(rotation.turns[:, None], state and state.turns)

    def seen_by_map(x, slots: slice):
        """Return queries or keys in these slots as the maps see them."""
        return x if rotation is None else rotation.of(turns[:, 0, slots]).undo(x.float()).to(query.dtype)

    gone, own = slice(0, at.length), slice(at.window, at.window + at.length)
    q, left = linear.features_beside(seen_by_map(at.query, own), map_query)
    k = linear.features_of_keys(seen_by_map(at.key[:, :, gone].to(query.dtype), gone), map_key)
    v, leaves = at.value[:, :, gone].to(query.dtype), at.leaving().expand(query.shape[0], -1)
    before = None if state is None else state.linear.detach().float().contiguous()
    log_scale = log_mix.float()[:, None] + left
    out, lse = window_form.softmax_of_context(at, scaling)
    leaves = leaves.to(torch.uint8).contiguous()
    gate = None if log_decay is None else linear.gates(log_decay, k, at.counted())
    learned = [*map_query.tensors.values(), *map_key.tensors.values(), log_mix, log_decay]
    if native.by_hand(query, key, value, *learned):
        mass = log_scale.expand(query.shape[0], -1, at.length).contiguous()
        S = linear.beside_softmax(q, k, v, leaves, gate, before, out, lse, mass)
    else:
        numerator, den, S = linear.on_features(q, k, v, leaves, gate, before, linear.IDENTITY, 1.0, None)
        out = joined(out, lse, numerator, den, log_scale)
    out = at.unalign(out).to(query.dtype)
    return out, HybridState(at.state(), S, None if turns is None else at.recent(turns)) if keep_state else None


def _step(query, key, value, map_query, map_key, number, log_mix, scaling, window, sinks, state, log_decay):
    """Return what `hybrid_attention` returns for one token after a state: one launch beside the count."""
    from ._step import step  # imports triton

    tensors, numbers, new = window_form.step_arguments(query, key, value, sinks, window, state.window)
    batch, heads, _, dim = query.shape
    value_dim, columns = value.shape[-1], 32
    out = query.new_empty(batch, heads, 1, value_dim)
    before = state.linear.float().contiguous()
    after = torch.empty_like(before)
    deltas = (m.tensors.get("delta") for m in (map_query, map_key))
    learned = [query if d is None else d.contiguous() for d in deltas]
    learned += [log_mix, log_mix if log_decay is None else log_decay]
    gpu.launch(
        step, (batch * key.shape[1], -(-(value_dim + 1) // columns)), query, *tensors, out, *learned, before, after,
        *numbers, float(scaling), D=dim, DV=value_dim, BD=gpu.width(dim), BE=columns, SINKS=sinks, MAP=number,
        HAS_DECAY=log_decay is not None, BN=32, num_warps=4,
    )  # fmt: skip
    return out, HybridState(WindowState(*new, state.window.count + 1), after)
