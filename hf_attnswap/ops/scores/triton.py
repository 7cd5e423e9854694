"""Compute scores on a GPU by fused Triton kernels, forward and backward: O(n d) memory, causal and full masks, padding.

The kernels stand in `_forward.py`, `_backward.py` and `_activations.py`. Query heads share keys by index, nothing is
repeated. The backward pass makes the scores again and is deterministic. One row alone goes by torch. They pass Triton's
interpreter and compile for sm_80 and sm_90.
"""

from typing import Any

import torch
from torch import Tensor

from ... import native
from .. import gpu
from .reference import with_gain
from .torch import at_once

devices = gpu.DEVICES
dtypes = gpu.DTYPES
available = gpu.missing

_NUMBERS = {"relu": 0, "relu2": 1, "sigmoid": 2, "softplus": 3, "gelu": 4, "exp": 5, "relu_power": 6}
_SIGMOID, _EXP, _POWER, _UNSHIFTED = 2, 5, 6, 7
_DENOMINATORS = {None: 0, "count": 1, "total": 2}
_COUNT, _TOTAL = 1, 2


def unfit(query, key, value, mask, scaling, activation, gain, result_dtype):
    """Return why the kernels cannot serve the call, in words, or None."""
    divided = None if activation.denominator is None else activation.denominator.name
    if activation.name not in _NUMBERS:
        return f"the activation {activation.name} is not one of the kernels'"
    if divided not in _DENOMINATORS:
        return f"the denominator {divided} is not one of the kernels'"
    if activation.needs_peak != (divided == "total") and (activation.needs_peak or "offset" in activation.tensors):
        return f"the kernels have no {activation.name} with the denominator {divided}"
    if not mask.plain:
        return f"the kernels take causal and full masks with padding, not {mask}"
    if scaling <= 0:
        return f"the kernels take scores times a positive number, not {scaling}"
    return gpu.unfit(query, key, value)


def run(query, key, value, mask, scaling, activation, gain, result_dtype):
    """Return what `score_attention` returns; takes its arguments in order."""
    if query.shape[2] == 1 and not torch.compiler.is_compiling():
        return at_once(query, key, value, mask, scaling, activation, gain, result_dtype)
    query, key, value = gpu.alike(query, key, value)
    params, divided = activation.params, activation.denominator
    number = _UNSHIFTED if params.get("shift") == "none" else _NUMBERS[activation.name]
    kind = 0 if divided is None else _DENOMINATORS[divided.name]
    settings = {} if divided is None else divided.params
    factor, scale = None, float(scaling)
    if torch.is_tensor(activation.factor):
        factor = activation.factor.float()
    else:
        scale *= activation.factor
    offset = activation.tensors.get("offset")
    tensors = (query, key, value, offset if offset is None else offset.float(), factor)
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # A gradient through the sum of a row needs the output as exact as the sum.
    out_dtype = torch.float32 if gain is not None or (learning and kind == _TOTAL) else result_dtype
    padding = (None, None, None) if mask.valid is None else _padding(mask)
    numbers = (
        number, params.get("p", 1).bit_length() - 1, kind, float(settings.get("alpha", 0)),
        float(settings.get("eps", 0)), scale, mask.causal, out_dtype, learning,
    )  # fmt: skip
    call = _forward if native.by_hand(*tensors) else forward
    return with_gain(call(*tensors, *padding, *numbers)[0], gain).to(result_dtype)


def _padding(mask) -> tuple[Tensor, Tensor, Tensor]:
    """Return VALID, RANGE and COUNT as `_rows.py` describes them, without waiting for the device."""
    valid = mask.valid.to(torch.uint8).contiguous()
    counts = valid.cumsum(1, dtype=torch.int32)
    total = counts[:, -1]
    first = valid.argmax(1).int()
    last = torch.where(total > 0, mask.key_length - valid.flip(1).argmax(1).int(), first)
    by_row = counts[:, mask.offset :] if mask.causal else total[:, None].expand(-1, mask.query_length)
    ranges = torch.stack([first, last, (last - first == total).int()], dim=1).int()
    return valid, ranges.contiguous(), by_row.clamp(min=1).float().contiguous()


def blocks(stage: str, dtype: torch.dtype, widest: int, roomy: bool) -> dict[str, int]:
    """Return how many rows (BM) and keys (BN) a tile has, and the warps and stages of a program.

    Args:
        stage: "forward", "queries" or "keys".
        dtype: of the query.
        widest: columns of the widest tile.
        roomy: whether there are 160 kB of shared memory.
    """
    if gpu.INTERPRETED:
        return {"BM": 16, "BN": 32}
    columns = max(64, widest)
    rows, keys, warps, stages = _LONG[columns] if dtype == torch.float32 else _SHORT[columns][stage]
    return {"BM": rows, "BN": keys, "num_warps": warps, "num_stages": stages if roomy else min(stages, 2)}


# Rows, keys, warps and stages by the columns of the widest tile: for float32, and for numbers of 16 bits.
_LONG = {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 1)}
_SHORT = {
    64: {"forward": (128, 64, 8, 3), "queries": (128, 64, 8, 3), "keys": (32, 128, 8, 2)},
    128: {"forward": (128, 64, 8, 3), "queries": (64, 64, 8, 2), "keys": (32, 64, 8, 2)},
    256: {"forward": (64, 32, 8, 2), "queries": (32, 32, 8, 1), "keys": (32, 32, 8, 1)},
}


def _constants(q, v, valid, offset, factor, number, squarings, kind, causal) -> dict[str, Any]:
    """Return the constants that all kernels of a call have in common."""
    return {
        "D": q.shape[-1], "DV": v.shape[-1], "BD": gpu.width(q.shape[-1]), "BDV": gpu.width(v.shape[-1]),
        "ACT": number, "LOGP": squarings, "TOTAL": kind == _TOTAL, "CAUSAL": causal, "PAD": valid is not None,
        "HAS_OFFSET": offset is not None, "HAS_FACTOR": factor is not None, "IP": gpu.precision(q.dtype),
    }  # fmt: skip


def _results(q, v, number, kind, out_dtype, learning) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return memory for the output, the sums, the peaks and their keys; without elements what is not needed."""
    batch, heads, length, _ = q.shape
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = q.new_empty(batch, length, heads, v.shape[-1], dtype=out_dtype).transpose(1, 2)

    def per_row(needed: bool, dtype=torch.float32) -> Tensor:
        return q.new_empty((batch, heads, length) if learning and needed else 0, dtype=dtype)

    return out, per_row(kind == _TOTAL), per_row(number >= _EXP), per_row(number == _POWER, torch.int32)


def _forward(q, k, v, offset, factor, valid, ranges, counts, number, squarings, kind, alpha, eps, scale, causal,
             out_dtype, learning):  # fmt: skip
    from ._forward import forward as kernel  # imports triton

    q, k, v = (gpu.side_by_side(t) for t in (q, k, v))
    out, totals, peaks, peak_at = _results(q, v, number, kind, out_dtype, learning)
    constants = _constants(q, v, valid, offset, factor, number, squarings, kind, causal)
    sizes = blocks("forward", q.dtype, max(constants["BD"], constants["BDV"]), gpu.roomy(q))
    batch, heads, length, _ = q.shape
    beside = (q if t is None else t for t in (offset, factor, valid, ranges, counts))
    gpu.launch(
        kernel, (-(-length // sizes["BM"]), batch * heads), q, q, k, v, out, totals, peaks, peak_at, *beside,
        *gpu.strides(q, k, v, out), heads, heads // k.shape[1], length, k.shape[2], scale, alpha, eps, **constants,
        COUNTED=kind == _COUNT, LEARNING=learning, ASM=_packed(q), **sizes,
    )  # fmt: skip
    return out, totals, peaks, peak_at


def _packed(q: Tensor) -> bool:
    """Return whether one instruction makes two bfloat16 numbers of two positive parts."""
    return q.dtype == torch.bfloat16 and not gpu.INTERPRETED and torch.version.hip is None


@torch.library.custom_op("hf_attnswap::scores_triton", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor | None,
    factor: Tensor | None,
    valid: Tensor | None,
    ranges: Tensor | None,
    counts: Tensor | None,
    number: int,
    squarings: int,
    kind: int,
    alpha: float,
    eps: float,
    scale: float,
    causal: bool,
    out_dtype: torch.dtype,
    learning: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output and, where `learning`, the sums of the weights, the peaks of the scores and their keys.

    Args:
        offset, factor: `[H]`, float32. valid, ranges, counts: as `_padding` returns them.
        number, squarings: the activation, and the logarithm of its power. kind: the denominator.
    """
    return _forward(q, k, v, offset, factor, valid, ranges, counts, number, squarings, kind, alpha, eps, scale, causal,
                    out_dtype, learning)  # fmt: skip


@forward.register_fake
def _(q, k, v, offset, factor, valid, ranges, counts, number, squarings, kind, alpha, eps, scale, causal, out_dtype,
      learning):  # fmt: skip
    return _results(q, v, number, kind, out_dtype, learning)


@torch.library.custom_op("hf_attnswap::scores_triton_backward", mutates_args=())
def backward(
    grad: Tensor,
    out: Tensor,
    totals: Tensor,
    peaks: Tensor,
    peak_at: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor | None,
    factor: Tensor | None,
    valid: Tensor | None,
    ranges: Tensor | None,
    counts: Tensor | None,
    number: int,
    squarings: int,
    kind: int,
    alpha: float,
    eps: float,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, offset and factor, the last two without elements where they are None."""
    from . import _backward as kernels  # imports triton

    grad, q, k, v = (gpu.side_by_side(t) for t in (grad, q, k, v))
    batch, heads, length, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    constants = _constants(q, v, valid, offset, factor, number, squarings, kind, causal)
    widest = max(constants["BD"], constants["BDV"])
    sizes = {stage: blocks(stage, q.dtype, widest, gpu.roomy(q)) for stage in ("queries", "keys")}
    dq, dk, dv = _gradients(q, k, v)
    rows = q.new_empty(batch, heads, length, dtype=torch.float32)
    g = q.new_empty(batch, heads, length, v.shape[-1])
    delta = torch.empty_like(rows) if kind == _TOTAL else rows
    sums = torch.empty_like(rows) if number == _POWER or offset is not None else rows
    of_factor = torch.empty_like(rows) if factor is not None else rows
    of_masks = [q if t is None else t for t in (valid, ranges, counts)]
    beside = [*(q if t is None else t for t in (offset, factor)), *of_masks]
    shape = (heads, heads // kv_heads, length, keys, scale, eps)
    part = {name: constants[name] for name in ("DV", "BDV", "TOTAL", "CAUSAL", "PAD")}
    gpu.launch(
        kernels.prepare, (-(-length // 32), batch * heads), q, out, grad, totals, g, delta, of_masks[2],
        *gpu.strides(out, grad), heads, length, keys, alpha, eps, **part, COUNTED=kind == _COUNT, BM=32,
    )  # fmt: skip
    gpu.launch(
        kernels.of_queries, (-(-length // sizes["queries"]["BM"]), batch * heads), q, q, k, v, g, dq, totals, peaks,
        peak_at, delta, sums, of_factor, *beside, *gpu.strides(q, k, v, dq), *shape, **constants, **sizes["queries"],
    )  # fmt: skip
    gpu.launch(
        kernels.of_keys, (-(-keys // sizes["keys"]["BN"]), batch * kv_heads), q, q, k, v, g, dk, dv, totals, peaks,
        peak_at, delta, sums, *beside, *gpu.strides(q, k, v, dk, dv), *shape, **constants, **sizes["keys"],
    )  # fmt: skip
    doffset = q.new_empty(0, dtype=torch.float32) if offset is None else sums.sum((0, 2))
    dfactor = q.new_empty(0, dtype=torch.float32) if factor is None else of_factor.sum((0, 2))
    return dq, dk, dv, doffset, dfactor


def _gradients(q, k, v) -> tuple[Tensor, ...]:
    """Return memory for the gradients, laid out as [B, T, H, D]."""
    return tuple(t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))


@backward.register_fake
def _(grad, out, totals, peaks, peak_at, q, k, v, offset, factor, *rest):
    per_head = (q.new_empty(0 if t is None else t.shape, dtype=torch.float32) for t in (offset, factor))
    return *_gradients(q, k, v), *per_head


def _keep(ctx, inputs, output):
    tensors, ctx.numbers = inputs[:8], inputs[8:-2]
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx, grad, *_):
    saved = ctx.saved_tensors  # which gradient checkpointing hands out once
    dq, dk, dv, doffset, dfactor = backward(grad, *saved, *ctx.numbers)
    offset, factor = saved[7:9]
    return dq, dk, dv, None if offset is None else doffset, None if factor is None else dfactor, *[None] * 12


forward.register_autograd(_backward, setup_context=_keep)
