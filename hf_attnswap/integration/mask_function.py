"""The mask function: what transformers calls, by its name, to make the masks of a swapped model."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from ..config import NAME
from ..masks import Packed, find_segments, from_segments, values_are_hidden


def _of_known_shape(make: Callable) -> Callable:
    """Wrap the mask function: refuse a mask that does not fit the keys, and make masks whose changes are counted.

    A tensor of inference mode has no version, so that every layer would look at its entries again.
    """

    @functools.wraps(make)
    def checked(*args, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
        if values_are_hidden():
            return make(*args, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None:
            _check_shape(attention_mask, *args, **kwargs)
        if not torch.is_inference_mode_enabled():
            return make(*args, attention_mask=attention_mask, **kwargs)
        with torch.inference_mode(False):
            attention_mask = None if attention_mask is None else attention_mask.clone()
            return make(*args, attention_mask=attention_mask, **kwargs)

    return checked


def _check_shape(
    attention_mask: Tensor, batch_size: int, q_length: int, kv_length: int, q_offset=0, kv_offset=0, *args, **kwargs
) -> None:
    """Raise ValueError where the mask of a call is not `[B, S]`; a cache of a fixed size has more than S columns."""
    keys, shape = kv_offset + kv_length, tuple(attention_mask.shape)
    fits = len(shape) == 2 and shape[0] == batch_size
    if fits and isinstance(keys, int):
        fixed_size = not isinstance(q_offset, int) or keys > q_offset + q_length
        fits = shape[1] <= keys if fixed_size else shape[1] == keys
    if not fits:
        raise ValueError(f"attention_mask has shape {shape}; expected ({batch_size}, {keys}), an entry for each key")


@_of_known_shape
def attnswap_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """Make the mask of a model that has swapped layers; transformers calls this function.

    Returns:
        None where the module's `is_causal` says all (a whole text or one token, nothing padded); bool `[B, S]` for
        causal attention with padding; int32 `[B, S]` for packed texts (0: padding); bool `[B, 1, T, S]` for anything
        else (one row, expanded, where all tokens attend to all others). What the model had before, where other modules
        read the masks too.
    """
    columns = slice(kv_offset, kv_offset + kv_length)
    saved = getattr(kwargs.get("config"), NAME, None) or {}
    if saved.get("matrix_masks"):
        make = AttentionMaskInterface()[saved["kept"] if saved["kept"] in ("sdpa", "eager") else "sdpa"]
        return make(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)
    if mask_function is bidirectional_mask_function:
        if attention_mask is None:
            valid = torch.ones(batch_size, 1, 1, kv_length, dtype=torch.bool, device=kwargs.get("device"))
        else:
            valid = attention_mask[:, None, None, columns].bool()
        # As for SDPA, which then goes by the module's is_causal: some models rely on that.
        skip = kwargs.get("allow_is_bidirectional_skip")
        if attention_mask is not None:
            skip = skip and not values_are_hidden() and valid.all()
        return None if skip else valid.expand(-1, -1, q_length, -1)
    grows = isinstance(q_offset, int | torch.SymInt) and kv_length + kv_offset == q_offset + q_length
    if not kwargs.get("allow_is_causal_skip", True) and mask_function is causal_mask_function:
        grows = False  # the model wants a matrix, to add to it
    if grows and mask_function is causal_mask_function:
        if attention_mask is not None and values_are_hidden():
            return attention_mask[:, columns].bool()  # a program sees no entries, so it keeps the mask
        whole = q_length in (1, kv_length) and saved.get("kept") != "eager"
        if attention_mask is None:
            if whole:
                return None
            return torch.ones(batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device"))
        valid = attention_mask[:, columns].bool()
        return None if whole and valid.all() else valid
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}

    def rows(start: int, stop: int) -> Tensor:
        return sdpa_mask(
            batch_size, stop - start, kv_length, q_offset + start, kv_offset, mask_function, attention_mask, **kwargs
        )

    if grows and q_offset == 0 and not values_are_hidden():
        segments = find_segments(rows, kv_length)
        if segments is not None:
            return segments if isinstance(from_segments(segments), Packed) else segments > 0
    return rows(0, q_length)
