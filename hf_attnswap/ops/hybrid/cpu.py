"""Compute the hybrid by the CPU kernels: softmax by tiles of rows, then the recurrence, which joins both as it goes.

The maps are those of the form `cpu` of the op `linear`.
"""

import functools
import threading

import torch

from ... import native
from ..heads import compute_dtype, in_dtype
from ..linear.cpu import branch, gates, hybrid_branch, kernel_of, matrices
from ..programs import transformed
from ..sliding import HybridState, Step, context, whole
from ..window.cpu import fits_step, softmax_of_context, step, step_in_program
from ._joined import joined

devices = ("cpu",)
dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
available = native.missing


def unfit(
    query, key, value, map_query, map_key, log_mix, scaling, window, sinks, valid, state, keep_state,
    rotation, log_decay,
):  # fmt: skip
    """Return why the kernel cannot serve the call, in words, or None."""
    if transformed() or torch.jit.is_tracing():
        return "torch.func and torch.jit.trace take torch's own operations only"
    if kernel_of(map_query, map_key) is None:
        return f"the map {map_query.name} is not one of the kernel's"
    return None


def run(
    query, key, value, map_query, map_key, log_mix, scaling, window, sinks, valid, state, keep_state,
    rotation, log_decay,
):  # fmt: skip
    """Return what `hybrid_attention` returns; takes its arguments in order."""
    dtype, maps = compute_dtype(query.dtype), (map_query, map_key)
    if torch.compiler.is_compiling() and state is not None:  # one program for all lengths
        state = HybridState(whole(state.window, window, sinks), state.linear, state.turns)
    if state is not None and rotation is None and fits_step(query, key, value, valid, window, sinks, state.window):
        form = _step_in_program if torch.compiler.is_compiling() else _step
        return form(query, key, value, *maps, log_mix, scaling, window, sinks, state, log_decay)
    at = context(query, key, value, valid, window, sinks, state and state.window)
    turns = None if rotation is None else at.slots(rotation.turns[:, None], state and state.turns)

    def seen_by_map(x, slots: slice):
        """Return queries or keys in these slots as the maps see them."""
        return x.to(dtype) if rotation is None else rotation.of(turns[:, 0, slots]).undo(x.to(dtype))

    if isinstance(at, Step):
        numerator, denominator, peak = at.softmax_parts(scaling)
        out, lse = numerator / denominator, (peak + denominator.log()).squeeze(-1)
        leaving_key, leaving_value, leaves = at.leaving()
        own, gone, counted = slice(-1, None), slice(0, 1), None
    else:
        out, lse = softmax_of_context(at, scaling)
        gone = slice(0, at.length)
        leaving_key, leaving_value, leaves = at.key[:, :, gone], at.value[:, :, gone], at.leaving()
        own, counted = slice(at.window, at.window + at.length), at.counted()
    leaves = None if leaves is None else leaves.expand(query.shape[0], -1)
    leaving_key = seen_by_map(leaving_key, gone)
    given = (seen_by_map(at.query, own), leaving_key, leaving_value.to(dtype), leaves)
    given += (gates(log_decay, leaving_key, counted), state and state.linear.to(dtype))
    out, S = _with_linear(given, maps, log_mix, log_decay, out, lse)
    out = (out if isinstance(at, Step) else at.unalign(out)).to(query.dtype)
    return out, HybridState(at.state(), S, None if turns is None else at.recent(turns)) if keep_state else None


def _step(query, key, value, map_query, map_key, log_mix, scaling, window, sinks, state, log_decay):
    """Return what `hybrid_attention` returns for one token after a state, where `fits_step` of the window holds."""
    old, S = state.window, in_dtype(state.linear, query.dtype).contiguous()
    batch, heads, _, dim = query.shape
    _, kv_heads, slots, value_dim = old.value.shape
    lse, den = query.new_empty(batch, heads, 1), query.new_empty(batch, heads, 1)
    leaves, after = query.new_empty(batch, 1, dtype=torch.bool), torch.empty_like(S)
    out, window_after = step(query, key, value, scaling, window, sinks, old, lse, leaves)
    kind, gate = kernel_of(map_query, map_key), gates(log_decay, key, None)
    sizes = (batch, heads, kv_heads, dim, value_dim, slots, kind, query.dtype)
    call = _prepared_step(threading.get_ident(), torch.get_num_threads(), *sizes)
    given = [t.contiguous() for t in (query, old.key, old.value)]
    learned = [*matrices(kind, map_query, map_key, query.dtype), in_dtype(log_mix, query.dtype)]
    learned = [None if t is None else t.contiguous() for t in (*learned, None if gate is None else gate.exp())]
    query, old_key, old_value, wq, wk, log_mix, gate = map(native.pointer, (*given, *learned))
    oldest = sinks * lse.element_size()  # beside the sinks
    old_key, old_value = old_key + oldest * dim, old_value + oldest * value_dim
    last = map(native.pointer, (out, lse, den, leaves, S, after))
    call(query, old_key, old_value, wq, wk, log_mix, gate, *last)
    return out, HybridState(window_after, after)


@functools.lru_cache
def _prepared_step(thread, threads, batch, heads, kv_heads, dim, value_dim, slots, kind, dtype) -> native.Prepared:
    """Return the call that joins the linear branch, for the calling thread; its tensors are contiguous."""
    call = native.Linear(
        threads=threads,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        length=1,
        dim=dim,
        value_dim=value_dim,
        map=kind,
        beside=1,
        scale=1.0,
        q=native.side_by_side(heads, dim),
        k=native.side_by_side(kv_heads, dim, slots),
        v=native.side_by_side(kv_heads, value_dim, slots),
        out=native.side_by_side(heads, value_dim),
        gate=native.side_by_side(kv_heads, 1),
    )
    fields = "q", "k", "v", "wq", "wk", "log_mix", "gate", "out", "lse", "den", "mask", "state", "after"
    return native.Prepared("linear_forward", dtype, call, fields)


def _step_in_program(query, key, value, map_query, map_key, log_mix, scaling, window, sinks, state, log_decay):
    """Return what `_step` returns, by operators that torch.compile takes."""
    old, oldest = state.window, slice(sinks, sinks + 1)  # beside the sinks
    out, lse, leaves, after = step_in_program(query, key, value, scaling, window, sinks, old)
    given = (query, old.key[:, :, oldest], old.value[:, :, oldest], leaves, gates(log_decay, key, None))
    given += (state.linear.to(query.dtype),)
    out, S = _with_linear(given, (map_query, map_key), log_mix, log_decay, out, lse)
    return out, HybridState(after, S)


def _with_linear(given, maps, log_mix, log_decay, out, lse):
    """Return the output of both branches, and the state of the linear one.

    Args:
        given: the first arguments of `branch`; out, lse: of the softmax. the others: as the op takes them.
    """
    learned = [*maps[0].tensors.values(), *maps[1].tensors.values(), log_mix, log_decay]
    if native.by_hand(*given[:3], out, *learned):
        return out, hybrid_branch(*given, *maps, log_mix, out, lse)
    numerator, den, S, left = branch(*given, *maps)
    return joined(out, lse, numerator, den, left + log_mix.to(den.dtype)[:, None]), S
