"""The sliding window of a layer: how large it is, and a mask that says so, for variants that honour it themselves."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attentions import Attention
from ..masks import Mask, Packed, values_are_hidden


def sliding_window(module: nn.Module, attention: Attention, kwargs: dict[str, Any]) -> int | None:
    """Return how many tokens a row of an attention module may see at most; None for all.

    The call says so, or the module; some models tell it to their masks alone, and the swap has found it.
    """
    return kwargs.get("sliding_window", getattr(module, "sliding_window", attention.reach))


def within(mask: Mask | Packed, window: int, layer: Any) -> Mask | Packed:
    """Return the mask of a call of a layer with a sliding window, with that window where the variant has to know it.

    It has to where a row could see more, and where there is a state, which is then another from the start.

    Args:
        mask: what `parse` returned for this window.
        layer: the `StateLayer` of a generating call; None where there is no state.

    Raises:
        NotImplementedError: the mask lets a row see beyond the window, or padding stands between the tokens of a text.
    """
    length = mask.segments.shape[1] if isinstance(mask, Packed) else mask.key_length
    if isinstance(mask, Mask) and (mask.dense is not None or not mask.causal):
        return mask
    if length > window and mask.window is None and _sees_beyond(mask, window):
        raise NotImplementedError(
            f"the model's sliding window is {window}, and the mask of this call lets tokens see farther than that, or "
            "cannot be looked into: leave attention_mask to the model, or pass one row per text, 1 where a token counts"
        )
    if layer is None or isinstance(mask, Packed):
        return mask
    mask = replace(mask, window=window)
    if mask.offset and length > window:
        mask = replace(mask, valid=_with_past(mask, window, layer.taken))
        if mask.valid is not None and not values_are_hidden() and _has_holes(mask, window):
            raise NotImplementedError(
                f"padding stands between the tokens that the model's sliding window of {window} counts: pad on the left"
            )
    return mask


def _sees_beyond(mask: Mask | Packed, window: int) -> bool:
    """Return whether a text stretches over more than `window` columns; True where nobody can look."""
    if isinstance(mask, Mask) and mask.valid is None or values_are_hidden():
        return True
    texts = mask.segments.long() if isinstance(mask, Packed) else mask.valid.long()
    column = torch.arange(texts.shape[1], device=texts.device).expand_as(texts)
    ends = texts.new_zeros(texts.shape[0], int(texts.max()) + 1)
    first = (ends + texts.shape[1]).scatter_reduce(1, texts, column, "amin")
    last = ends.scatter_reduce(1, texts, column, "amax")
    return bool(((last - first)[:, 1:] >= window).any())  # 0 is padding


def _with_past(mask: Mask, window: int, taken: Tensor | None) -> Tensor | None:
    """Return which of the keys are valid, bool `[B, S]`, or None for all: the mask does not tell of those before."""
    gone = mask.offset - window + 1
    if gone <= 0 or taken is None and mask.valid is None:
        return mask.valid
    past = mask.valid[:, :gone] if taken is None else taken[:, :gone]
    now = past.new_ones(past.shape[0], mask.key_length - gone) if mask.valid is None else mask.valid[:, gone:]
    return torch.cat([past, now], dim=1)


def _has_holes(mask: Mask, window: int) -> bool:
    """Return whether a row sees fewer of the valid keys than the last `window` of them."""
    places = F.pad(mask.valid.long().cumsum(1), (1, 0))
    upto = places[:, mask.offset + 1 :]
    before = F.pad(places, (window, 0))[:, mask.offset + 1 : mask.key_length + 1]
    return bool(((upto - before != upto.clamp(max=window)) & mask.valid[:, mask.offset :]).any())
