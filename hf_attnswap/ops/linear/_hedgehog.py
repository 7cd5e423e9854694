"""Make hedgehog's features by a Triton kernel, with a gradient (`_maps.py` has the formulas)."""

import torch
from torch import Tensor

from ... import native
from .. import gpu


def features(x: Tensor, delta: Tensor, scale: float = 1.0, beside: bool = False) -> tuple[Tensor, Tensor]:
    """Return hedgehog's features of x times `scale`, `[B, H, T, 2 D]` in the dtype of x, and the logs left out of them.

    Args:
        x: `[B, H, T, D]`; delta: `[H, D, D]`. beside: as `FeatureMap.beside` makes them, with logs `[B, H, T]`.
    """
    delta = delta.to(x.dtype)
    call = _forward if native.by_hand(x, delta) else forward
    return call(x, delta, scale, beside)


def _results(x, beside) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = x.shape
    left = x.new_empty((batch, heads, length) if beside else 0, dtype=torch.float32)
    return x.new_empty(batch, heads, length, 2 * dim), left


def _sizes(x) -> dict:
    rows = 16 if gpu.INTERPRETED else 32 if x.dtype == torch.float32 or x.shape[-1] > 128 else 64
    widths = {"D": x.shape[-1], "BD": gpu.width(x.shape[-1])}
    return {**widths, "IP": gpu.precision(x.dtype), "BM": rows, "num_warps": 4 if widths["BD"] <= 64 else 8}


def _forward(x, delta, scale, beside) -> tuple[Tensor, Tensor]:
    from ._maps import hedgehog as kernel  # imports triton

    x, delta = gpu.side_by_side(x), delta.contiguous()
    batch, heads, length, _ = x.shape
    (out, left), sizes = _results(x, beside), _sizes(x)
    gpu.launch(
        kernel, (-(-length // sizes["BM"]), batch * heads), x, x, delta, out, left, *gpu.strides(x, out), heads, length,
        scale, **sizes, BESIDE=beside,
    )  # fmt: skip
    return out, left


@torch.library.custom_op("hf_attnswap::hedgehog_triton", mutates_args=())
def forward(x: Tensor, delta: Tensor, scale: float, beside: bool) -> tuple[Tensor, Tensor]:
    """Return what `features` returns, for `delta` in the dtype of x."""
    return _forward(x, delta, scale, beside)


@forward.register_fake
def _(x, delta, scale, beside):
    return _results(x, beside)


@torch.library.custom_op("hf_attnswap::hedgehog_triton_backward", mutates_args=())
def backward(out: Tensor, grad: Tensor, x: Tensor, delta: Tensor, scale: float, beside: bool
                      ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x and delta, for that of the features `out`."""
    from ._maps import hedgehog_backward as kernel  # imports triton

    grad, delta = gpu.side_by_side(grad), delta.contiguous()
    batch, heads, length, dim = x.shape
    dy, dx, sizes = x.new_empty(x.shape), x.new_empty(x.shape), _sizes(x)
    gpu.launch(
        kernel, (-(-length // sizes["BM"]), batch * heads), x, out, grad, delta, dy, dx,
        *gpu.strides(out, grad, dy, dx), heads, length, scale, **sizes, BESIDE=beside,
    )  # fmt: skip
    by_head = (t.transpose(0, 1).reshape(heads, batch * length, dim) for t in (x, dy))
    of_x, of_y = by_head
    return dx, torch.bmm(of_x.mT, of_y)


@backward.register_fake
def _(out, grad, x, delta, scale, beside):
    return x.new_empty(x.shape), torch.empty_like(delta)


def _keep(ctx, inputs, output):
    x, delta, *ctx.numbers = inputs
    ctx.save_for_backward(output[0], x, delta)


def _backward(ctx, grad, _grad_left):
    out, x, delta = ctx.saved_tensors
    return *backward(out, grad, x, delta, *ctx.numbers), None, None


forward.register_autograd(_backward, setup_context=_keep)
