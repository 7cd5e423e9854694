"""All that a call says of who may attend to whom, in the one form that variants take."""

from dataclasses import replace

import torch
from torch import Tensor

from ..attentions import Attention
from ..config import NAME
from ..masks import Mask, Packed, from_segments, parse, values_are_hidden
from .sliding import sliding_window, within

# Without an attention_mask and without a cache, transformers looks for packed texts and makes a matrix of it.
UNDER_COMPILE = " (torch.compile cannot look into masks: there, pass attention_mask, ones where nothing is padded)"
ANY_MASK = "relu, relu_norm, relu_power, sigmoid and the other variants on the scores"


def read_mask(module, attention: Attention, query, key, attention_mask, layer, kwargs) -> Mask | Packed:
    """Return all that a call says of which row may attend to which key.

    Raises:
        NotImplementedError: the variant cannot honour that.
        ValueError: attention_mask does not fit query and key.
    """
    # Without a mask SDPA goes by is_causal, and eager attention lets every row attend to everything.
    causal = kwargs.get("is_causal")
    if (getattr(module.config, NAME, None) or {}).get("kept") == "eager" or attention.kind == "cross":
        causal = False
    elif causal is None:
        causal = getattr(module, "is_causal", True)
    if attention.kind == "causal" and query.shape[2] == 1:
        causal = True  # of one row a mask does not tell, nor does the module of a decoder that goes by its mask alone
    with_state = attention.stateful and layer is not None
    _check_rows(attention_mask, query)
    window = sliding_window(module, attention, kwargs) if attention.slides and attention.kind == "causal" else None
    if with_state:
        mask = layer.read(attention_mask, query.shape[2], bool(causal), window, asker=module)
    else:
        mask = parse(attention_mask, query.shape[2], key.shape[2], bool(causal), window=window, asker=module)
    mask = _for_every_row(mask, query.shape[0])
    if kwargs.get("cu_seq_lens_q") is not None and not isinstance(mask, Packed):
        if attention_mask is not None:
            raise NotImplementedError("cu_seq_lens_q packs several texts, and attention_mask says nothing of them")
        mask = _from_lengths(kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k"), query, key, causal)
    if kwargs.get("seq_idx") is not None and isinstance(mask, Mask):
        mask = _from_indices(kwargs["seq_idx"], mask)
    bias, softcap, sinks = kwargs.get("position_bias"), kwargs.get("softcap"), kwargs.get("s_aux")
    sinks = kwargs.get("sinks") if sinks is None else sinks
    if bias is not None and not attention.any_mask and not values_are_hidden() and not bias.any():
        bias = None  # T5 passes zeros where it has no bias
    if bias is not None or softcap is not None or sinks is not None:
        if isinstance(mask, Packed):
            raise NotImplementedError("packed texts together with a bias, a soft cap or sinks are not supported")
        if sinks is not None and sinks.dim() != 1:
            raise NotImplementedError(f"its sinks have shape {tuple(sinks.shape)}; expected one score per head")
        if bias is not None:
            bias = bias if mask.bias is None else bias + mask.bias
        mask = replace(mask, bias=bias if bias is not None else mask.bias, softcap=softcap, sinks=sinks)
    if window is not None:
        mask = within(mask, window, layer if with_state else None)
    if isinstance(mask, Mask) and not mask.without_window().plain and not attention.any_mask:
        raise NotImplementedError(
            f"cannot honour {mask}: it takes causal or bidirectional masks with padding, and packed texts; "
            f"{ANY_MASK} take any{UNDER_COMPILE if mask.dense is not None else ''}"
        )
    kind = attention.kind if not mask.causal and attention.kind != "causal" else None
    kind = kind or ("causal" if mask.causal else "bidirectional")
    if kind not in attention.kinds:
        raise NotImplementedError(f"it is for {' and '.join(attention.kinds)} attention, and this mask is {kind}")
    return mask


def _check_rows(attention_mask: Tensor | None, query: Tensor) -> None:
    """Raise ValueError where a mask is neither for all rows, and all heads, nor for each of these."""
    if attention_mask is not None:
        fits = attention_mask.shape[0] in (1, query.shape[0])
        if not fits or attention_mask.dim() == 4 and attention_mask.shape[1] not in (1, query.shape[1]):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, and there are {query.shape[0]} rows of "
                f"{query.shape[1]} heads; expected one for all, or one each"
            )


def _for_every_row(mask: Mask | Packed, batch: int) -> Mask | Packed:
    """Return a mask whose padding and texts are given for each row of the batch."""
    one = mask.segments if isinstance(mask, Packed) else mask.valid
    if one is None or one.shape[0] == batch:
        return mask
    given = one.expand(batch, -1)
    return replace(mask, segments=given) if isinstance(mask, Packed) else replace(mask, valid=given)


def _from_lengths(ends_q: Tensor, ends_k: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Packed:
    """Segments from the cumulative lengths of packed texts, `[texts + 1]`."""
    length = query.shape[2]
    if ends_k is not None and not torch.equal(ends_q, ends_k):
        raise NotImplementedError("cu_seq_lens_q and cu_seq_lens_k differ, which packed texts do not")
    if query.shape[0] != 1 or key.shape[2] != length or int(ends_q[-1]) != length:
        raise NotImplementedError(
            f"cu_seq_lens_q ends at {int(ends_q[-1])}, but there are {query.shape[0]} rows of {length} queries and "
            f"{key.shape[2]} keys; expected one row of that length"
        )
    position = torch.arange(length, device=query.device)
    return Packed(torch.bucketize(position, ends_q[1:].to(query.device), right=True, out_int32=True)[None] + 1, causal)


def _from_indices(seq_idx: Tensor, mask: Mask) -> Mask | Packed:
    """Return the mask of texts packed into rows, from the index of each token's text, `[B, T]` (negative: padding)."""
    if mask.dense is not None or tuple(seq_idx.shape[1:]) != (mask.key_length,):
        raise NotImplementedError(
            f"seq_idx of shape {tuple(seq_idx.shape)} packs several texts, and {mask} over {mask.key_length} keys says "
            "nothing of them"
        )
    segments = (seq_idx + 1).clamp(min=0)
    return from_segments(segments if mask.valid is None else segments * mask.valid, mask.causal)
