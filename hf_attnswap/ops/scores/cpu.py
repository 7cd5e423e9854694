"""Compute scores by the CPU kernels: tiles of 16 rows of the heads that share a key, with a causal mask and padding.

The scores of a tile stand transposed, so that sums, maxima and masks need no work across a vector. Where an activation
needs the largest score of its row, the tile's scores are made first and kept until they have become weights; softmax
goes on from the largest so far, and brings its sums to a new one. Keys whose weights are all zero are passed over. The
backward pass makes the scores again. One row alone, a step of generation, reads keys and values once.
"""

import torch
from torch import Tensor

from ... import native
from ..heads import compute_dtype, in_dtype
from ..programs import transformed
from .reference import with_gain
from .torch import at_once

devices = ("cpu",)
dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
available = native.missing

# As in native/src/activations.h.
_ACTIVATIONS = {"relu": 0, "relu2": 1, "sigmoid": 2, "softplus": 3, "gelu": 4, "exp": 5, "relu_power": 6}
_UNSHIFTED = 7
_DENOMINATORS = {"count": 1, "total": 2}


def unfit(query, key, value, mask, scaling, activation, gain, result_dtype):
    """Return why the kernel cannot serve the call, in words, or None."""
    if transformed() or torch.jit.is_tracing():
        return "torch.func and torch.jit.trace take torch's own operations only"
    if activation.name not in _ACTIVATIONS:
        return f"the activation {activation.name} is not one of the kernel's"
    if activation.denominator is not None and activation.denominator.name not in _DENOMINATORS:
        return f"the denominator {activation.denominator.name} is not one of the kernel's"
    return None if mask.plain else f"the kernel takes causal and full masks with padding, not {mask}"


def run(query, key, value, mask, scaling, activation, gain, result_dtype):
    """Return what `score_attention` returns; takes its arguments in order."""
    if query.shape[2] == 1 and not torch.compiler.is_compiling() and not fits_row(query, key, value):
        return at_once(query, key, value, mask, scaling, activation, gain, result_dtype)
    dtype, params = compute_dtype(query.dtype), activation.params
    query, key, value = (in_dtype(t, dtype) for t in (query, key, value))
    factor = activation.factor_for(query)
    if torch.is_tensor(factor):
        query, factor = query * factor, 1.0
    kind = _ACTIVATIONS[activation.name]
    kind = _UNSHIFTED if params.get("shift") == "none" else kind
    denominator, settings = 0, {}
    if activation.denominator is not None:
        denominator, settings = _DENOMINATORS[activation.denominator.name], activation.denominator.params
    offset = activation.tensors["offset"].to(dtype) if "offset" in activation.tensors else None
    numbers = (
        kind,
        params.get("p", 1).bit_length() - 1,
        denominator,
        float(settings.get("alpha", 0)),
        float(settings.get("eps", 0)),
        float(scaling * factor),
        mask.causal,
    )
    arguments = (query, key, value, mask.valid, offset, *numbers)
    call = _forward if native.by_hand(query, key, value, offset) else forward
    out = call(*arguments)[0][..., : value.shape[-1]]
    return in_dtype(with_gain(out, gain), result_dtype)


def fits_row(query, key, value) -> bool:
    """Return whether the kernel can take all keys and values as they are; a copy would take longer than the row."""
    return all(
        t.dtype == compute_dtype(t.dtype) == query.dtype and t.shape[-1] % 16 == 0 and t.stride(-1) == 1
        for t in (key, value)
    )


def _counts(q: Tensor, k: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
    """Return how many keys each row may attend to, at least 1, `[1 or B, T]`."""
    length, keys = q.shape[2], k.shape[2]
    if valid is None:
        rows = torch.arange(keys - length + 1, keys + 1, dtype=q.dtype)[None]
        return rows if causal else torch.full_like(rows, keys)
    counts = valid.to(q.dtype).cumsum(1)
    return (counts[:, keys - length :] if causal else counts[:, -1:].expand(-1, length)).clamp(min=1)


def _call(q, k, v, valid, offset, kind, squarings, denominator, alpha, eps, scale, causal, out, total, peak, count):
    """Return the structure that forward and backward pass have in common; keeps nothing alive."""
    return native.Scores(
        threads=torch.get_num_threads(),
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        length=q.shape[2],
        keys=k.shape[2],
        dim=q.shape[3],
        value_dim=v.shape[3],
        causal=causal,
        activation=kind,
        squarings=squarings,
        denominator=denominator,
        count_stride=0 if count is None or count.shape[0] == 1 else count.stride(0),
        parts=1,
        scale=scale,
        alpha=alpha,
        eps=eps,
        q=native.strided(q),
        k=native.strided(k),
        v=native.strided(v),
        out=native.strided(out),
        mask=native.pointer(valid),
        count=native.pointer(count),
        offset=native.pointer(offset),
        total=native.pointer(total),
        peak=native.pointer(peak),
    )


def _results(q, v) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for the output, filled up to whole vectors, and for sums and peaks of the rows."""
    batch, heads, length, _ = q.shape
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = q.new_empty(batch, length, heads, v.shape[-1] + -v.shape[-1] % 16).transpose(1, 2)
    return out, q.new_empty(batch, heads, length), q.new_empty(batch, heads, length)


def _prepared(q, k, v, valid, offset, kind, _, denominator, *numbers):
    """Return the tensors as the kernel takes them, and the counts of the rows; None where nothing asks for these."""
    counted = kind == _ACTIVATIONS["sigmoid"] or denominator == _DENOMINATORS["count"]
    count = _counts(q, k, valid, numbers[-1]).contiguous() if counted else None
    valid, offset = (None if t is None else t.contiguous() for t in (valid, offset))
    return [*(native.whole_vectors(t) for t in (q, k, v)), valid, offset], count


def _forward(q, k, v, valid, offset, *numbers) -> tuple[Tensor, Tensor, Tensor]:
    results = _results(q, v)
    tensors, count = _prepared(q, k, v, valid, offset, *numbers)
    kernel = "scores_row" if q.shape[2] == 1 else "scores_forward"
    native.run(kernel, q.dtype, _call(*tensors, *numbers, *results, count))
    return results


@torch.library.custom_op("hf_attnswap::scores", mutates_args=(), device_types="cpu")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    offset: Tensor | None,
    kind: int,
    squarings: int,
    denominator: int,
    alpha: float,
    eps: float,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, its last dimension filled up to a multiple of 16, and what the backward pass wants of rows.

    See `Scores` in `native/src/interface.h` for the arguments.
    """
    return _forward(q, k, v, valid, offset, kind, squarings, denominator, alpha, eps, scale, causal)


@forward.register_fake
def _(q, k, v, *rest):
    return _results(q, v)


@torch.library.custom_op("hf_attnswap::scores_backward", mutates_args=(), device_types="cpu")
def backward(
    grad_out: Tensor,
    out: Tensor,
    total: Tensor,
    peak: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    offset: Tensor | None,
    kind: int,
    squarings: int,
    denominator: int,
    alpha: float,
    eps: float,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and offset (empty where that is None)."""
    numbers = kind, squarings, denominator, alpha, eps, scale, causal
    tensors, count = _prepared(q, k, v, valid, offset, *numbers)
    wide_q, wide_k, wide_v = tensors[:3]
    call = _call(*tensors, *numbers, out, total, peak, count)
    batch, heads, length, dim = q.shape
    pairs = batch * k.shape[1]
    # Each part of the rows sums for itself, so that results do not depend on who is first.
    call.parts = parts = 1 if call.threads == 1 else max(1, min(call.threads * 2 // pairs, -(-length // 64)))
    grad_out = native.rows(grad_out)
    dq = q.new_empty(batch, length, heads, wide_q.shape[-1]).transpose(1, 2)
    dk, dv = (q.new_zeros(parts * batch, *t.shape[1:]) for t in (wide_k, wide_v))
    doffset = q.new_zeros(parts, batch, heads)
    call.go, call.dq, call.dk, call.dv = (native.strided(t) for t in (grad_out, dq, dk, dv))
    call.doffset = native.pointer(doffset)
    native.run("scores_backward", q.dtype, call)
    dk, dv = (t.unflatten(0, (parts, batch)).sum(0) if parts > 1 else t for t in (dk, dv))
    # The results may not be views of what is filled up.
    dq, dk, dv = (t[..., : like.shape[-1]].clone() if t.shape[-1] > like.shape[-1] else t
                  for t, like in ((dq, q), (dk, k), (dv, v)))  # fmt: skip
    return dq, dk, dv, q.new_empty(0) if offset is None else doffset.sum((0, 1))


@backward.register_fake
def _(grad_out, out, total, peak, q, k, v, valid, offset, *rest):
    batch, heads, length, dim = q.shape
    dq = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    return dq, q.new_empty(k.shape), q.new_empty(v.shape), q.new_empty(0 if offset is None else offset.shape)


def _keep(ctx, inputs, output):
    q, k, v, valid, offset, *ctx.numbers = inputs
    ctx.save_for_backward(*output, q, k, v, valid, offset)


def _backward(ctx, grad_out, _grad_total, _grad_peak):
    saved = ctx.saved_tensors  # which gradient checkpointing hands out once
    dq, dk, dv, doffset = backward(grad_out, *saved, *ctx.numbers)
    return dq, dk, dv, None, None if saved[-1] is None else doffset, *[None] * 7


forward.register_autograd(_backward, setup_context=_keep)
