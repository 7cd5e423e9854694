"""Compute window attention on a GPU by Triton kernels, forward and backward, and one token in one launch.

Rows go by blocks over the sinks and the slots of their windows (`_forward.py`, `_backward.py`): O(n (w + m) d) time,
O(n d) memory. The backward pass makes the scores again and adds nothing atomically. The kernels pass Triton's
interpreter and compile for sm_80 and sm_90.
"""

import torch
from torch import Tensor

from ... import native
from .. import gpu
from ..sliding import Context, Step, WindowState, context

devices = gpu.DEVICES
dtypes = gpu.DTYPES
available = gpu.missing

# Rows of which the gradients of the sinks are summed by one program.
_PART = 1024
# More sinks than this do not stand in one tile.
_SINKS = 64


def unfit(query, key, value, scaling, window, sinks, valid, state, keep_state, reach):
    """Return why the kernels cannot serve the call, in words, or None."""
    if torch.compiler.is_compiling():
        return "torch's own operations only are compiled"
    if reach is not None:
        return "sinks that go out of reach are not known to the kernels"
    if sinks > _SINKS:
        return f"there are {sinks} sinks, the kernels take {_SINKS}"
    return gpu.unfit(query, key, value)


def run(query, key, value, scaling, window, sinks, valid, state, keep_state, reach):
    """Return what `window_attention` returns; takes its arguments in order."""
    if valid is None and state is None and not keep_state:
        return softmax_of_text(query, key, value, scaling, window, sinks)[0].to(query.dtype), None
    if fits_step(query, key, value, valid, window, sinks, state):
        out, after = _step(query, key, value, scaling, window, sinks, state)
        return out, after if keep_state else None
    at = context(query, key, value, valid, window, sinks, state)
    if isinstance(at, Step):
        numerator, denominator, _ = at.softmax_parts(scaling)
        out = numerator / denominator
    else:
        out = at.unalign(softmax_of_context(at, scaling)[0])
    return out.to(query.dtype), at.state() if keep_state else None


def fits_step(query, key, value, valid, window, sinks, state) -> bool:
    """Return whether the kernel of one token serves the call: all sinks kept, no padding, no gradient, one dtype."""
    if query.shape[2] != 1 or valid is not None or state is None or torch.is_grad_enabled():
        return False
    alike = all(t.dtype == query.dtype for t in (key, value, state.key, state.value))
    return alike and state.first(window, sinks) == sinks


def step_arguments(query, key, value, sinks, window, state) -> tuple[list, list, tuple[Tensor, Tensor]]:
    """Return the tensors and the numbers with which the kernels of one token begin, and the slots that they write."""
    q, k, v, old_k, old_v = (gpu.side_by_side(t) for t in (query, key, value, state.key.contiguous(), state.value))
    old_v = old_v.contiguous()
    slots = old_k.shape[2]
    now = min(slots + 1, sinks + window)
    new = tuple(t.new_empty(*t.shape[:2], now, t.shape[3]) for t in (old_k, old_v))
    numbers = [*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], k.shape[1], q.shape[1] // k.shape[1], slots, now]
    return [q, k, v, old_k, old_v, state.count, *new], numbers, new


def _step(query, key, value, scaling, window, sinks, state) -> tuple[Tensor, WindowState]:
    """Return the output of one token after a state, and the state with the token: one launch beside the count."""
    from ._step import step  # imports triton

    tensors, numbers, new = step_arguments(query, key, value, sinks, window, state)
    batch, heads, _, dim = query.shape
    value_dim, columns = value.shape[-1], 32
    out = query.new_empty(batch, heads, 1, value_dim)
    gpu.launch(
        step, (batch * key.shape[1], -(-value_dim // columns)), query, *tensors, out, *numbers, float(scaling), D=dim,
        DV=value_dim, BD=gpu.width(dim), BE=columns, SINKS=sinks, BN=32, num_warps=4,
    )  # fmt: skip
    return out, WindowState(*new, state.count + 1)


def softmax_of_text(query, key, value, scaling, window, sinks) -> tuple[Tensor, Tensor]:
    """Return what `softmax_of_context` returns, for a whole text without padding."""
    query, key, value = gpu.alike(query, key, value)
    near = (key[:, :, :sinks], value[:, :, :sinks])
    return _softmax(query, key, value, *near, None, scaling, min(window, key.shape[2]), sinks, 0)


def softmax_of_context(at: Context, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the output of the aligned rows, `[B, H, T, Dv]`, and the log of the mass of each, `[B, H, T]`.

    The mass is -inf, and the output 0, where a row sees nothing. The output is float32 where a gradient is wanted.
    """
    given = (at.query, at.key, at.value, at.sink_key, at.sink_value)
    tensors = (t.to(at.query.dtype) for t in given)
    return _softmax(*tensors, at.count, scaling, at.window, at.sinks, at.window)


def _softmax(q, k, v, sink_k, sink_v, count, scaling, window, sinks, ahead) -> tuple[Tensor, Tensor]:
    given = (q, k, v, sink_k, sink_v)
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    run = _forward if native.by_hand(*given) else forward
    return run(*given, count, float(scaling), window, sinks, ahead, learning)


def blocks(dtype: torch.dtype, widest: int) -> dict[str, int]:
    """Return the rows (BM) and slots (BN) of a tile, and the warps and stages of a program.

    Args:
        widest: columns of the widest tile.
    """
    if gpu.INTERPRETED:
        return {"BM": 16, "BN": 16}
    if dtype == torch.float32:
        return {"BM": 32 if widest <= 128 else 16, "BN": 32, "num_warps": 8, "num_stages": 1}
    if widest <= 128:
        return {"BM": 64, "BN": 64, "num_warps": 4 if widest <= 64 else 8, "num_stages": 2}
    return {"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 1}


def _constants(q, v, sinks, count) -> dict:
    widths = {"BD": gpu.width(q.shape[-1]), "BDV": gpu.width(v.shape[-1])}
    return {
        "D": q.shape[-1], "DV": v.shape[-1], **widths, "SINKS": sinks, "HAS_COUNT": count is not None,
        "IP": gpu.precision(q.dtype), **blocks(q.dtype, max(widths.values())),
    }  # fmt: skip


def _results(q, v, learning) -> tuple[Tensor, Tensor]:
    """Return memory for the output, float32 for a gradient through the sum of a row, and for the log of the mass."""
    batch, heads, length, _ = q.shape
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    dtype = torch.float32 if learning else q.dtype
    out = q.new_empty(batch, length, heads, v.shape[-1], dtype=dtype).transpose(1, 2)
    return out, q.new_empty(batch, heads, length, dtype=torch.float32)


def _forward(q, k, v, sink_k, sink_v, count, scaling, window, sinks, ahead, learning) -> tuple[Tensor, Tensor]:
    from ._forward import forward as kernel  # imports triton

    q, *shared = (gpu.side_by_side(t) for t in (q, k, v, sink_k, sink_v))
    out, lse = _results(q, v, learning)
    batch, heads, length, _ = q.shape
    constants = _constants(q, v, min(sinks, sink_k.shape[2]), count)
    gpu.launch(
        kernel, (-(-length // constants["BM"]), batch * heads), q, q, *shared, q if count is None else count, out, lse,
        *gpu.strides(q, *shared, out), heads, heads // k.shape[1], length, k.shape[2], scaling, window, ahead,
        **constants, BS=gpu.width(max(sinks, 1)),
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("hf_attnswap::window_triton", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    count: Tensor | None,
    scaling: float,
    window: int,
    sinks: int,
    ahead: int,
    learning: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log of the mass; see `_forward.py` for the arguments."""
    return _forward(q, k, v, sink_k, sink_v, count, scaling, window, sinks, ahead, learning)


@forward.register_fake
def _(q, k, v, sink_k, sink_v, count, scaling, window, sinks, ahead, learning):
    return _results(q, v, learning)


@torch.library.custom_op("hf_attnswap::window_triton_backward", mutates_args=())
def backward(
    grad: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    count: Tensor | None,
    scaling: float,
    window: int,
    sinks: int,
    ahead: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and of the keys and values of the sinks."""
    from . import _backward as kernels  # imports triton

    grad, q, *shared = (gpu.side_by_side(t) for t in (grad, q, k, v, sink_k, sink_v))
    batch, heads, length, dim = q.shape
    kv_heads, slots = k.shape[1:3]
    value_dim, sinks = v.shape[-1], min(sinks, sink_k.shape[2])
    g = q.new_empty(batch, heads, length, value_dim)
    delta = torch.empty_like(lse)
    gpu.launch(
        kernels.prepare, (-(-length // 32), batch * heads), q, out, grad, grad_lse.contiguous(), g, delta,
        *gpu.strides(out, grad), heads, length, DV=value_dim, BDV=gpu.width(value_dim), BM=32,
    )  # fmt: skip
    constants = _constants(q, v, sinks, count)
    counts = q if count is None else count
    shape = (heads, heads // kv_heads, length)
    dq, dk, dv = _gradients(q, k, v)
    gpu.launch(
        kernels.of_queries, (-(-length // constants["BM"]), batch * heads), q, q, *shared, counts, g, lse, delta, dq,
        *gpu.strides(q, *shared, dq), *shape, slots, scaling, window, ahead, **constants, BS=gpu.width(max(sinks, 1)),
    )  # fmt: skip
    gpu.launch(
        kernels.of_keys, (-(-slots // constants["BN"]), batch * kv_heads), q, q, *shared[:2], counts, g, lse, delta,
        dk, dv, *gpu.strides(q, *shared[:2], dk, dv), *shape, slots, scaling, window, ahead, **constants,
    )  # fmt: skip
    if not sinks:
        return dq, dk, dv, torch.zeros_like(sink_k), torch.zeros_like(sink_v)
    parts = -(-length // _PART)
    sums = [t.new_empty(parts, *t.shape[:2], sinks, t.shape[3], dtype=torch.float32) for t in (sink_k, sink_v)]
    del constants["BN"]
    gpu.launch(
        kernels.of_sinks, (parts, batch * kv_heads), q, q, *shared[2:], counts, g, lse, delta, *sums,
        *gpu.strides(q, *shared[2:]), *shape, scaling, _PART, **constants, BS=gpu.width(sinks),
    )  # fmt: skip
    return dq, dk, dv, *(s.sum(0).to(t.dtype) for s, t in zip(sums, (sink_k, sink_v), strict=True))


def _gradients(q, k, v) -> tuple[Tensor, ...]:
    """Return memory for the gradients, laid out as [B, T, H, D]."""
    return tuple(t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))


@backward.register_fake
def _(grad, grad_lse, out, lse, q, k, v, sink_k, sink_v, *rest):
    return *_gradients(q, k, v), *(t.new_empty(t.shape) for t in (sink_k, sink_v))


def _keep(ctx, inputs, output):
    *tensors, scaling, window, sinks, ahead, _ = inputs
    ctx.numbers = scaling, window, sinks, ahead
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse):
    out, lse, *tensors = ctx.saved_tensors  # which gradient checkpointing hands out once
    grad = torch.zeros_like(out) if grad is None else grad
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    return *backward(grad, grad_lse, out, lse, *tensors, *ctx.numbers), *[None] * 6


forward.register_autograd(_backward, setup_context=_keep)
