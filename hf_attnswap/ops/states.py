"""Carry the state of linear attention, `S = sum_j phi(k_j) [v_j, 1]^T`, over one token or over a few chunks.

The column of ones behind the values makes the denominator `sum_j phi(q_i) . phi(k_j)` one more column of every
product, so that numerator and denominator stand side by side in `Dv + 1` columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import product, tril_
from .programs import in_one_piece


def fading(log_decay: Tensor, counted: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Return what remains at each token of all that came before its chunk, and what remains at the end of each chunk.

    Factors of at most `d^-chunk` come of the first: a decay of 1/2 and chunks of 64 stay in the range of float32.

    Args:
        log_decay: log d, `[Hkv]`.
        counted: bool `[1 or B, T]`, False for tokens at which nothing fades: padding. T is a multiple of `chunk`.
        chunk: tokens per chunk.

    Returns:
        `d^{n_i}` as `[1 or B, Hkv, T, 1]`, n_i the number of tokens counted in the chunk up to the token, and the same
        at the last token of each chunk, `[T / chunk, 1 or B, Hkv]`; in the dtype of `log_decay`.
    """
    n = counted.unflatten(1, (-1, chunk)).cumsum(2).to(log_decay.dtype)
    since = (n[:, None] * log_decay[:, None, None]).exp()
    return since.flatten(2)[..., None], since[..., -1].permute(2, 0, 1)


def tokens_that_count(mask: Tensor | None, length: int, device: torch.device, more: int = 0) -> Tensor:
    """Return `mask`, bool `[B, T]`, or `[1, T]` of ones where there is none, with `more` tokens that do not count."""
    counted = torch.ones(1, length, dtype=torch.bool, device=device) if mask is None else mask
    return F.pad(counted, (0, more))


def faded(q: Tensor, k: Tensor, since: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return features with the powers of the decay, and the factors of `kept` for each matrix of `linear_block`.

    Args:
        q: `[B, H, T, F]`; k: `[B, Hkv, T, F]`. since, kept: as `fading` returns them.

    Returns:
        q and k in their shapes, and `[c, B Hkv, 1, 1]`.
    """
    kept = kept.expand(-1, k.shape[0], -1).flatten(1)[..., None, None]
    return q * since.repeat_interleave(q.shape[1] // k.shape[1], dim=1), k / since, kept


def decays(log_gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much remains, at each token of a chunk, of each earlier token and of the state before the chunk.

    Args:
        log_gate: `[B Hkv, t]`.

    Returns:
        `prod_{s < l <= i} g_l` as `[B Hkv, t, t]`, 0 in the future, and `prod_{l <= i} g_l` as `[B Hkv, t, 1]`.
    """
    size = log_gate.shape[1]
    between = log_gate[:, :, None].expand(-1, -1, size).tril(-1).cumsum(1)
    return between.exp_().tril(), log_gate.cumsum(1).exp_()[..., None]


def linear_step(
    q: Tensor, k: Tensor, value: Tensor, state: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add one token to the state and read the state: the recurrent form, in few kernels; O(F Dv) time per head.

    `S_i = d S_{i-1} + k_i [v_i, 1]^T`, and the output is `q_i S_i`.

    Args:
        q: features `[B, H, 1, F]`; k: features `[B, Hkv, 1, F]`; value: `[B, Hkv, 1, Dv]`.
        state: `[B, Hkv, F, Dv + 1]`, in the dtype of q and k; left as it is.
        kept: the factor d, broadcastable to `[B, Hkv, 1, 1]`; None for 1.

    Returns:
        Numerator and denominator `[B, H, 1, Dv + 1]`, and the state with the token.
    """
    batch, heads, _, width = q.shape
    state = state if kept is None else state * kept
    state = torch.addcmul(state, k.mT, F.pad(value.to(state.dtype), (0, 1), value=1.0))
    mixed = torch.matmul(q.reshape(batch, value.shape[1], -1, width), state)
    return mixed.view(batch, heads, 1, -1), state


def linear_block(q: Tensor, k: Tensor, v: Tensor, state: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute causal linear attention of a few chunks after a state, over features.

    O(t^2 (F + Dv)) time per chunk for the products inside, O(t F Dv) for those with the state.

    Args:
        q: `[c, B Hkv, G t, F]`; k: `[c, B Hkv, t, F]`; v: `[c, B Hkv, t, Dv + 1]` with a last column of ones.
        state: `[B Hkv, F, Dv + 1]`, before the first chunk.
        kept: what remains of the state over each chunk, `[c, B Hkv, 1, 1]`, where q and k are `faded`; None for all.

    Returns:
        Numerator and denominator `[c, B Hkv, G t, Dv + 1]`, and the state after the last chunk.
    """
    if in_one_piece(k):
        return linear_block_at_once(q, k, v, state, kept)
    before, state = running_sums(state, k, v, kept)
    inside = product(tril_(product(q, k.mT), k.shape[2]), v)
    return product(q, before, add_to=inside), state


def linear_block_at_once(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `linear_block` returns, without a loop over the chunks and without changing a tensor in place.

    With `kept`, the sums over the chunks take O(c^2 F Dv) time.
    """
    added = torch.cat([state[None], k.mT @ v])
    if kept is None:
        sums = added.cumsum(0)
    else:
        # What was added before chunk j, and by it, times what remains over it and the chunks that follow.
        logs = torch.cat([torch.ones_like(kept[:1]), kept]).flatten(1).log().T
        over = logs[:, :, None].expand(-1, -1, logs.shape[1]).tril().cumsum(1).exp().tril()
        sums = torch.einsum("rij,jrfe->irfe", over, added)
    inside = (q @ k.mT).unflatten(2, (-1, k.shape[2])).tril().flatten(2, 3) @ v
    return inside + q @ sums[:-1], sums[-1]


def running_sums(
    first: Tensor, x: Tensor, y: Tensor, kept: Tensor | None = None, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the sums `first + x_1^T y_1 + x_2^T y_2 ...` before each chunk, and the sum after all chunks.

    Args:
        first: `[R, F, E]`; x: `[c, R, t, F]`; y: `[c, R, t, E]`.
        kept: factor of the sum at the end of each chunk, `[c, R, 1, 1]`; None for 1.
        backwards: begin at the last chunk; "before" a chunk then means the chunks that come later in the text, and the
            factor of the chunk stands on what is before it: gradients of the sums, which go the other way.

    Returns:
        `[c, R, F, E]` and `[R, F, E]`.
    """
    before, order = [], range(len(x))
    for i in reversed(order) if backwards else order:
        if kept is not None and backwards:
            first = first * kept[i]
        before.append(first)
        first = torch.baddbmm(first, x[i].mT, y[i])
        if kept is not None and not backwards:
            first = first * kept[i]
    return torch.stack(before[::-1] if backwards else before), first


def values_with_ones(value: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """Return `[B, Hkv, c t, Dv]` as `[c, B Hkv, t, Dv + 1]` in `dtype`, with ones in the last column; t is `chunk`."""
    batch, kv_heads, length, width = value.shape
    with_ones = value.new_ones(length // chunk, batch * kv_heads, chunk, width + 1, dtype=dtype)
    by_chunk = value.unflatten(2, (-1, chunk)).permute(2, 0, 1, 3, 4)
    with_ones.unflatten(1, (batch, kv_heads))[..., :-1] = by_chunk
    return with_ones


def divided(mixed: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """Split `[..., Dv + 1]` into numerator over denominator plus `eps`, `[..., Dv]`, and the denominator, `[...]`.

    Where `eps` is None, the numerator is returned undivided.
    """
    numerator, denominator = mixed[..., :-1], mixed[..., -1:]
    return numerator if eps is None else numerator / (denominator + eps), denominator.squeeze(-1)


def numerator_grad(grad_out: Tensor, grad_den: Tensor, out: Tensor, den: Tensor, eps: float | None) -> Tensor:
    """Return the gradients of numerator and denominator side by side, `[B, H, t, Dv + 1]`, in the dtype of `den`.

    Args:
        grad_out, out: gradient of the output and the output, `[B, H, t, Dv]`.
        grad_den, den: gradient of the denominator and the denominator, `[B, H, t]`.
        eps: as the forward pass added it to the denominator; None where it did not divide.
    """
    if eps is None:
        return torch.cat([grad_out, grad_den[..., None]], dim=-1)
    grad_numerator = grad_out * (den + eps).reciprocal()[..., None]
    return torch.cat([grad_numerator, (grad_den - (grad_numerator * out).sum(-1))[..., None]], dim=-1)
