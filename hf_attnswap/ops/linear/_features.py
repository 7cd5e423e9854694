"""Features of some tokens, and where the results of these tokens go."""

import torch
from torch import Tensor

from ..heads import compute_dtype
from ..spec import FeatureMap


def scaled(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    x = x.to(dtype)
    return x if scale == 1 else x * scale


def mapped(x: Tensor, feature_map: FeatureMap, key_mask: Tensor | None = None, part: slice = slice(None)) -> Tensor:
    """Features of some tokens; zero where a key is switched off."""
    features = feature_map(x)
    return features if key_mask is None else features * key_mask[:, None, part, None].to(features.dtype)


def empty_result(query: Tensor, value: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = query.new_empty(batch, length, heads, value.shape[-1], dtype=out_dtype).transpose(1, 2)
    return out, query.new_empty(batch, heads, length, dtype=compute_dtype(query.dtype))


def write_result(numerator: Tensor, denominator: Tensor, out: Tensor, den: Tensor, eps: float | None) -> None:
    """The result and the denominator `[..., t, 1]` of some tokens to their place."""
    den.copy_(denominator.squeeze(-1))
    if eps is None:
        out.copy_(numerator)
    else:
        torch.div(numerator, denominator + eps, out=out)
