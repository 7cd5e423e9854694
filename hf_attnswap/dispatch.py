"""The seam: one attention function and one mask function, which transformers finds by name."""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.utils.output_capturing import _active_collector

from .attentions import Attention, Heads
from .attentions.softmax import Softmax
from .masks import Mask, Packed, find_segments, from_segments, parse
from .packing import unpack_rows

NAME = "attnswap"
# The name that stands in config.json: where this package is not imported, transformers' error quotes it.
GUARD = "attnswap: pip install hf_attnswap, then import hf_attnswap"
# The entries of config.json that hold it. Users and programs override the first one; the second is checked for every
# model, with experts or without.
GUARDED = ("attn_implementation", "experts_implementation")

# Keywords that models pass to their attention function and that change nothing about what a row attends to here:
# sliding_window is already in the mask, is_causal says what a missing mask means, shift_labels is for the loss,
# tokenizer for the stop strings of generate.
_HARMLESS = frozenset(
    "position_ids cache_position use_cache output_hidden_states output_router_logits return_dict num_items_in_batch "
    "input_ids grid_thw is_causal sliding_window output_attentions logits_to_keep shift_labels ignore_index "
    "deterministic tokenizer".split()
)
# Keywords that `read_mask` turns into a part of the mask, which the variant honours or refuses.
_HONOURED = frozenset("position_bias softcap s_aux sinks cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k".split())
# Keywords that change the result and that nothing here honours.
_REFUSED = {
    "head_mask": "a mask over heads",
    "cache": "a paged cache",
    "indices": "the keys that sparse attention has chosen",
    "block_indices": "the blocks that sparse attention has chosen",
}

Observer = Callable[..., Tensor]


def attnswap_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for every attention module of a model that has swapped layers.

    Args:
        module: the attention module; its `attnswap` is the variant, absent where the layer keeps softmax.
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`.
        attention_mask: what `attnswap_mask` returned, or a mask that the user made.

    Returns:
        `[B, T, H, Dv]`, and the weights `[B, H, T, S]` where `output_attentions` asks for them, else None.

    Raises:
        NotImplementedError: a mask or keyword that the variant cannot honour, with the layer.
        RuntimeError: the config says that this layer is swapped and the module carries no variant.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attention: Attention | None = getattr(module, NAME, None)
    layer = kwargs.pop("attnswap_state", None)
    if attention is None:
        _check_keywords(type(module).__name__, kwargs)
        out, weights = _kept(module, query, key, value, attention_mask, scaling, dropout, kwargs)
        return out.transpose(1, 2).contiguous(), weights
    where = f"{attention.place} ({attention.name})"
    _check_keywords(where, kwargs)
    if dropout:
        raise NotImplementedError(
            f"{where}: attention dropout {dropout} is not supported: set the dropout of attention in the model's "
            "config (attention_dropout, attention_probs_dropout_prob, attn_pdrop, ...) to 0 before it is loaded"
        )
    _check_window(where, attention, kwargs.get("sliding_window"), key.shape[2] if layer is None else layer.seen)
    _check_heads(where, attention, query, key, value)
    device = query.device.type
    precision = contextlib.nullcontext()
    if torch.is_autocast_enabled(device):
        # Models leave the three in different dtypes there; inside, each op chooses its own precision.
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
        precision = torch.autocast(device, enabled=False)
    try:
        with precision:
            mask = read_mask(module, attention, query, key, attention_mask, layer, kwargs)
            out = attend(attention, query, key, value, mask, scaling, layer)
            weights = _weights(attention, query, key, mask, scaling, layer) if _wanted(kwargs) else None
    except NotImplementedError as error:
        raise NotImplementedError(f"{where}: {error}") from error
    return out.transpose(1, 2).contiguous(), weights


def read_mask(module, attention: Attention, query, key, attention_mask, layer, kwargs) -> Mask | Packed:
    """All that a call says of what may attend to what, in one form; NotImplementedError where the variant cannot."""
    # Without a mask SDPA goes by is_causal, and eager attention lets every row attend to everything.
    causal = kwargs.get("is_causal")
    if (getattr(module.config, NAME, None) or {}).get("kept") == "eager" or attention.kind == "cross":
        causal = False
    elif causal is None:
        causal = getattr(module, "is_causal", True)
    if attention.kind == "causal" and query.shape[2] == 1:
        causal = True  # of one row a mask does not tell, nor does the module of a decoder that goes by its mask alone
    seen = layer.seen if attention.stateful and layer is not None else key.shape[2]
    mask = parse(attention_mask, query.shape[2], seen, bool(causal))
    if kwargs.get("cu_seq_lens_q") is not None and not isinstance(mask, Packed):
        if attention_mask is not None:
            raise NotImplementedError("cu_seq_lens_q packs several texts, and attention_mask says nothing of them")
        mask = _from_lengths(kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k"), query, key, causal)
    bias, softcap, sinks = kwargs.get("position_bias"), kwargs.get("softcap"), kwargs.get("s_aux")
    sinks = kwargs.get("sinks") if sinks is None else sinks
    if bias is not None and not attention.any_mask and not torch.compiler.is_compiling() and not bias.any():
        bias = None  # T5 passes zeros where it has no bias
    if bias is not None or softcap is not None or sinks is not None:
        if isinstance(mask, Packed):
            raise NotImplementedError("packed texts together with a bias, a soft cap or sinks are not supported")
        if sinks is not None and sinks.dim() != 1:
            raise NotImplementedError(f"its sinks have shape {tuple(sinks.shape)}; expected one score per head")
        if bias is not None:
            bias = bias if mask.bias is None else bias + mask.bias
        mask = replace(mask, bias=bias if bias is not None else mask.bias, softcap=softcap, sinks=sinks)
    if isinstance(mask, Mask) and not mask.plain and not attention.any_mask:
        raise NotImplementedError(
            f"cannot honour {mask}: it takes causal or bidirectional masks with padding, and packed texts; "
            f"{ANY_MASK} take any{UNDER_COMPILE if mask.dense is not None else ''}"
        )
    kind = attention.kind if not mask.causal and attention.kind != "causal" else None
    kind = kind or ("causal" if mask.causal else "bidirectional")
    if kind not in attention.kinds:
        raise NotImplementedError(f"it is for {' and '.join(attention.kinds)} attention, and this mask is {kind}")
    return mask


# Without an attention_mask and without a cache, transformers looks for packed texts and makes a matrix of it.
UNDER_COMPILE = " (torch.compile cannot look into masks: there, pass attention_mask, ones where nothing is padded)"
ANY_MASK = "relu, relu_norm, relu_power, sigmoid and the other variants on the scores"


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


def attend(attention: Attention, query, key, value, mask: Mask | Packed, scaling, layer=None) -> Tensor:
    """One variant on one call's tensors; `[B, H, T, Dv]`.

    Args:
        layer: the `StateLayer` of a generating call, whose `state` the variant reads and fills.
    """
    stateful = attention.stateful and layer is not None
    if stateful:
        if layer.served == layer.seen:
            raise NotImplementedError("its module calls its attention twice per token, and the state takes each once")
        if layer.packed:
            raise NotImplementedError("the cache holds packed texts, which cannot be continued: start from a new cache")
        layer.packed = isinstance(mask, Packed)
        before = layer.served

        def replay(state: dict[str, Tensor], tokens: int) -> None:
            seen = before + tokens
            valid = None if mask.valid is None else mask.valid[:, :seen]
            new = (t[:, :, :tokens] for t in (query, key, value))
            attention(*new, Mask(tokens, seen, valid), scaling, state)

        layer.record(replay)
        layer.served = layer.seen
    if isinstance(mask, Packed):

        def one(query, key, value, valid):
            mask_of_texts = Mask(query.shape[2], key.shape[2], None if mask.causal else valid, causal=mask.causal)
            return _observed(attention, query, key, value, mask_of_texts, scaling, None)

        return unpack_rows(one, query, key, value, mask.segments)
    return _observed(attention, query, key, value, mask, scaling, layer.state if stateful else None)


def _observed(attention, query, key, value, mask, scaling, state):
    observer: Observer | None = getattr(attention, "observer", None)
    if observer is not None:
        return observer(attention, query, key, value, mask, scaling, state)
    return attention(query, key, value, mask, scaling, state)


def _wanted(kwargs: dict) -> bool:
    """Whether the caller wants the weights: not every model passes `output_attentions` down to its attention."""
    collected = () if torch.compiler.is_compiling() else _active_collector.get() or ()
    return bool(kwargs.get("output_attentions")) or any("attentions" in name for name in collected)


def _weights(attention, query, key, mask, scaling, layer) -> Tensor:
    if attention.stateful and layer is not None and layer.seen > key.shape[2]:
        raise NotImplementedError(
            "output_attentions needs all keys, and a state has forgotten them: call the model with use_cache=False"
        )
    if isinstance(mask, Packed):
        mask = Mask(query.shape[2], key.shape[2], dense=_segments_matrix(mask))
        if not attention.any_mask:
            raise NotImplementedError("output_attentions on packed texts is not supported: pass one text per row")
    return attention.weights(query, key, mask, scaling)


def _segments_matrix(mask: Packed) -> Tensor:
    segments = mask.segments
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    return (same.tril() if mask.causal else same)[:, None]


def _check_keywords(where: str, kwargs: dict) -> None:
    for name, given in kwargs.items():
        if given is None or given is False or name in _HARMLESS or name in _HONOURED:
            continue
        reason = _REFUSED.get(name, "a keyword unknown to hf_attnswap")
        raise NotImplementedError(f"{where}: the model passes {name} ({reason}), which would be lost")


def _check_window(where: str, attention: Attention, sliding_window: int | None, length: int) -> None:
    # In a mask for one new token, a window over the past looks like padding in it.
    if sliding_window is not None and length > sliding_window and not attention.any_mask:
        raise NotImplementedError(
            f"{where}: cannot honour the model's sliding window of {sliding_window} over {length} tokens: "
            f"{ANY_MASK} take any mask"
        )


def _check_heads(where: str, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> None:
    heads = attention.heads
    # Tuples, because a Heads takes longer to make than all other checks of a step together.
    expected = heads.num_attention_heads, heads.num_key_value_heads, heads.head_dim, heads.value_dim
    found = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    if found != expected and attention.state_dict():
        raise NotImplementedError(
            f"{where}: its parameters were made for {heads}, but it is called with {Heads(*found)}"
        )


_SOFTMAX = Softmax(Heads(1, 1, 1))


def _kept(module, query, key, value, attention_mask, scaling, dropout, kwargs) -> Tensor:
    """A layer that keeps softmax: torch's SDPA, `[B, H, T, Dv]`."""
    if not getattr(module.config, NAME, None):
        raise RuntimeError("attn_implementation is 'attnswap' on a model that is not swapped: call hf_attnswap.swap")
    if not hasattr(module, "_attnswap_kept"):
        raise RuntimeError(
            f"config.json says which attention of {type(module).__name__} is swapped, but the module was not built by "
            "it: load the model with AutoModelFor*.from_pretrained after `import hf_attnswap`, or call hf_attnswap.swap"
        )
    mask = read_mask(module, _SOFTMAX, query, key, attention_mask, None, kwargs)
    if isinstance(mask, Packed):
        mask = Mask(query.shape[2], key.shape[2], dense=_segments_matrix(mask))
    out = _SOFTMAX(query, key, value, mask, scaling, dropout=dropout)
    return out, _SOFTMAX.weights(query, key, mask, scaling) if _wanted(kwargs) else None


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
    """What transformers calls to make the mask of a model with swapped layers.

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
            skip = skip and not torch.compiler.is_compiling() and valid.all()
        return None if skip else valid.expand(-1, -1, q_length, -1)
    grows = isinstance(q_offset, int) and kv_length + kv_offset == q_offset + q_length
    if not kwargs.get("allow_is_causal_skip", True) and mask_function is causal_mask_function:
        grows = False  # the model wants a matrix, to add to it
    if grows and mask_function is causal_mask_function:
        whole = q_length in (1, kv_length) and saved.get("kept") != "eager"
        if attention_mask is None:
            if whole:
                return None
            return torch.ones(batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device"))
        valid = attention_mask[:, columns].bool()
        # torch.compile sees no entries, so it keeps the mask.
        return None if whole and not torch.compiler.is_compiling() and valid.all() else valid
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}

    def rows(start: int, stop: int) -> Tensor:
        return sdpa_mask(
            batch_size, stop - start, kv_length, q_offset + start, kv_offset, mask_function, attention_mask, **kwargs
        )

    if grows and q_offset == 0 and not torch.compiler.is_compiling():
        segments = find_segments(rows, kv_length)
        if segments is not None:
            return segments if isinstance(from_segments(segments), Packed) else segments > 0
    return rows(0, q_length)


def register() -> None:
    """Make the names known to transformers; done once, when the package is imported."""
    for name in (NAME, GUARD):
        AttentionInterface.register(name, attnswap_attention)
        AttentionMaskInterface.register(name, attnswap_mask)
