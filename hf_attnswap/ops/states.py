"""The state of linear attention, `S = sum_j phi(k_j) [v_j, 1]^T`, carried over one token or over a few chunks.

The column of ones behind the values makes the denominator `sum_j phi(q_i) . phi(k_j)` one more column of every product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import product, tril_


def linear_step(q: Tensor, k: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token after a state, over features: the recurrent form, in few kernels.

    Args:
        q: `[B, H, 1, F]`; k: `[B, Hkv, 1, F]`; value: `[B, Hkv, 1, Dv]`; state: `[B, Hkv, F, Dv + 1]`.

    Returns:
        Numerator and denominator `[B, H, 1, Dv + 1]`, and the state with the token.
    """
    batch, heads, _, width = q.shape
    state = torch.addcmul(state, k.mT, F.pad(value.to(state.dtype), (0, 1), value=1.0))
    mixed = torch.matmul(q.reshape(batch, value.shape[1], -1, width), state)
    return mixed.view(batch, heads, 1, -1), state


def linear_block(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A few chunks after a state, over features, causal.

    Args:
        q: `[c, B Hkv, G t, F]`; k: `[c, B Hkv, t, F]`; v: `[c, B Hkv, t, Dv + 1]` with a last column of ones.
        state: `[B Hkv, F, Dv + 1]`.

    Returns:
        Numerator and denominator `[c, B Hkv, G t, Dv + 1]`, and the state with the chunks.
    """
    before, state = running_sums(state, k, v)
    inside = product(tril_(product(q, k.mT), k.shape[2]), v)
    return product(q, before, add_to=inside), state


def running_sums(first: Tensor, x: Tensor, y: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """`first + x_1^T y_1 + x_2^T y_2 ...` over `[c, R, *, *]`: what there is before each chunk, and after all.

    With `backwards` the sum begins at the last chunk.
    """
    before, order = [], range(len(x))
    for i in reversed(order) if backwards else order:
        before.append(first)
        first = torch.baddbmm(first, x[i].mT, y[i])
    return torch.stack(before[::-1] if backwards else before), first


def values_with_ones(value: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """`[B, Hkv, c t, Dv]` -> `[c, B Hkv, t, Dv + 1]`."""
    batch, kv_heads, length, width = value.shape
    with_ones = value.new_ones(length // chunk, batch * kv_heads, chunk, width + 1, dtype=dtype)
    by_chunk = value.unflatten(2, (-1, chunk)).permute(2, 0, 1, 3, 4)
    with_ones.unflatten(1, (batch, kv_heads))[..., :-1] = by_chunk
    return with_ones


def divided(mixed: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    numerator, denominator = mixed[..., :-1], mixed[..., -1:]
    return numerator if eps is None else numerator / (denominator + eps), denominator.squeeze(-1)


def numerator_grad(grad_out: Tensor, grad_den: Tensor, out: Tensor, den: Tensor, eps: float | None) -> Tensor:
    """Gradients of numerator and denominator side by side, `[B, H, t, Dv + 1]`, in the dtype of `den`."""
    if eps is None:
        return torch.cat([grad_out, grad_den[..., None]], dim=-1)
    grad_numerator = grad_out * (den + eps).reciprocal()[..., None]
    return torch.cat([grad_numerator, (grad_den - (grad_numerator * out).sum(-1))[..., None]], dim=-1)
