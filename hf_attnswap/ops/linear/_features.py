"""Make the features of some tokens, and write the output of these tokens to its place."""

import torch
from torch import Tensor

from ..heads import compute_dtype
from ..spec import FeatureMap


def scaled(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Return `x` times `scale`, in `dtype`."""
    x = x.to(dtype)
    return x if scale == 1 else x * scale


def mapped(x: Tensor, feature_map: FeatureMap, key_mask: Tensor | None = None, part: slice = slice(None)) -> Tensor:
    """Return the features of some tokens, `[B, heads, t, D]` -> `[B, heads, t, F]`, zero where a key is switched off.

    Args:
        key_mask: bool `[B, T]` over all tokens, False for keys that leave no trace; None where every key counts.
        part: which of the T tokens those of `x` are.
    """
    features = feature_map(x)
    return features if key_mask is None else features * key_mask[:, None, part, None].to(features.dtype)


def empty_result(query: Tensor, value: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return memory for the output `[B, H, T, Dv]` in `out_dtype` and the denominator `[B, H, T]`.

    The denominator is in `compute_dtype`.
    """
    batch, heads, length, _ = query.shape
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = query.new_empty(batch, length, heads, value.shape[-1], dtype=out_dtype).transpose(1, 2)
    return out, query.new_empty(batch, heads, length, dtype=compute_dtype(query.dtype))


def write_result(numerator: Tensor, denominator: Tensor, out: Tensor, den: Tensor, eps: float | None) -> None:
    """Write output and denominator of some tokens to their places `out` `[..., t, Dv]` and `den` `[..., t]`.

    Args:
        numerator: `[..., t, Dv]`; denominator: `[..., t, 1]`.
        eps: added to the denominator; None writes the numerator undivided.
    """
    den.copy_(denominator.squeeze(-1))
    if eps is None:
        out.copy_(numerator)
    else:
        torch.div(numerator, denominator + eps, out=out)
