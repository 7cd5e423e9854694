"""The seam: one attention function and one mask function, registered with transformers under one name."""

import contextlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from .attentions import Attention
from .masks import Mask, Packed, as_bool, find_segments, from_segments, parse
from .packing import unpack_rows

NAME = "attnswap"

# Keywords that models pass to their attention function and that change nothing about what a row attends to here:
# sliding_window is already in the mask, is_causal is checked when a module is swapped.
_HARMLESS = frozenset(
    "position_ids cache_position use_cache output_hidden_states output_router_logits return_dict num_items_in_batch "
    "is_causal sliding_window".split()
)
# Keywords that change the result and that no variant honours.
_REFUSED = {
    "softcap": "a soft cap on the scores",
    "s_aux": "learned attention sinks",
    "sinks": "learned attention sinks",
    "position_bias": "a bias on the scores",
    "head_mask": "a mask over heads",
    "cache": "a paged cache",
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
        `[B, T, H, Dv]` and None (weights are not returned).

    Raises:
        NotImplementedError: a mask or keyword that the variant cannot honour, with the layer.
        RuntimeError: the config says that this layer is swapped and the module carries no variant.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attention: Attention | None = getattr(module, NAME, None)
    if attention is None:
        return _kept(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    where = f"layer {module.layer_idx} ({attention.name})"
    layer = kwargs.pop("attnswap_state", None)
    _check_keywords(where, dropout, kwargs)
    _check_window(where, attention, kwargs.get("sliding_window"), key.shape[2] if layer is None else layer.seen)
    _check_heads(where, attention, query, key)
    device = query.device.type
    precision = contextlib.nullcontext()
    if torch.is_autocast_enabled(device):
        # Models leave the three in different dtypes there; inside, each op chooses its own precision.
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
        precision = torch.autocast(device, enabled=False)
    try:
        with precision:
            out = attend(attention, query, key, value, attention_mask, scaling, layer)
    except NotImplementedError as error:
        raise NotImplementedError(f"{where}: {error}") from error
    return out.transpose(1, 2).contiguous(), None


def attend(attention: Attention, query, key, value, attention_mask, scaling, layer=None) -> Tensor:
    """One variant on one call's tensors, whatever the form of the mask; `[B, H, T, Dv]`.

    Args:
        layer: the `StateLayer` of a generating call, whose `state` the variant reads and fills.
    """
    stateful = attention.stateful and layer is not None
    seen = layer.seen if stateful else key.shape[2]
    mask = parse(attention_mask, query.shape[2], seen)
    if stateful:
        if layer.served == seen:
            raise NotImplementedError("its module calls its attention twice per token, and the state takes each once")
        layer.served = seen
    if stateful and layer.packed:
        raise NotImplementedError("the cache holds packed texts, which cannot be continued: start from a new cache")
    if isinstance(mask, Packed):
        if stateful:
            layer.packed = True
        return unpack_rows(
            lambda q, k, v: _observed(attention, q, k, v, Mask(q.shape[2], k.shape[2]), scaling, None),
            query,
            key,
            value,
            mask.segments,
        )
    if mask.dense is not None and not attention.dense_masks:
        raise NotImplementedError(
            f"cannot honour {mask}: it takes causal masks with padding or packed texts; "
            "relu, relu_norm, relu_power and sigmoid take any mask"
        )
    return _observed(attention, query, key, value, mask, scaling, layer.state if stateful else None)


def _observed(attention, query, key, value, mask, scaling, state):
    observer: Observer | None = getattr(attention, "observer", None)
    if observer is not None:
        return observer(attention, query, key, value, mask, scaling, state)
    return attention(query, key, value, mask, scaling, state)


def _check_keywords(where: str, dropout: float, kwargs: dict) -> None:
    if dropout:
        raise NotImplementedError(
            f"{where}: attention dropout {dropout} is not supported: set the dropout of attention in the "
            "model's config (attention_dropout, attn_pdrop, ...) to 0"
        )
    if kwargs.get("is_causal") is False:
        raise NotImplementedError(f"{where}: is_causal=False is not supported: the layer was swapped as a causal one")
    for name, given in kwargs.items():
        if given is None or given is False or name in _HARMLESS:
            continue
        if name == "output_attentions":
            raise NotImplementedError(f"{where}: output_attentions=True is not supported by a swapped layer")
        reason = _REFUSED.get(name, "a keyword unknown to hf_attnswap")
        raise NotImplementedError(f"{where}: the model passes {name} ({reason}), which would be lost")


def _check_window(where: str, attention: Attention, sliding_window: int | None, length: int) -> None:
    # In a mask for one new token, a window over the past looks like padding in it.
    if sliding_window is not None and length > sliding_window and not attention.dense_masks:
        raise NotImplementedError(
            f"{where}: cannot honour the model's sliding window of {sliding_window} over {length} tokens: "
            "relu, relu_norm, relu_power and sigmoid take any mask"
        )


def _check_heads(where: str, attention: Attention, query: Tensor, key: Tensor) -> None:
    heads = attention.heads
    found = (query.shape[1], key.shape[1], query.shape[3])
    if (
        found != (heads.num_attention_heads, heads.num_key_value_heads, heads.head_dim)
        and next(attention.parameters(), None) is not None
    ):
        raise NotImplementedError(
            f"{where}: query heads, key/value heads and head_dim are {found}, but its parameters were made for {heads}"
        )


def _kept(module, query, key, value, attention_mask, **kwargs):
    """A layer that keeps softmax, in the implementation that the model had before."""
    if not getattr(module.config, NAME, None):
        raise RuntimeError("attn_implementation is 'attnswap' on a model that is not swapped: call hf_attnswap.swap")
    if module.layer_idx in swapped_layers(module.config):
        raise RuntimeError(
            f"config.json says that layer {module.layer_idx} is swapped, but the module carries no variant: load the "
            "model with AutoModelFor*.from_pretrained after `import hf_attnswap`, or call hf_attnswap.swap"
        )
    kwargs.pop("attnswap_state", None)
    if attention_mask is not None:
        if attention_mask.dim() == 2:
            parsed = parse(attention_mask, query.shape[2], key.shape[2])
            attention_mask = _segments_matrix(parsed.segments) if isinstance(parsed, Packed) else parsed.matrix()
        elif attention_mask.dim() == 4:
            attention_mask = as_bool(attention_mask)
    elif 1 < query.shape[2] < key.shape[2]:
        attention_mask = Mask(query.shape[2], key.shape[2]).matrix(query.device)
    if module.config.attnswap["kept"] == "eager":
        eager = sys.modules[type(module).__module__].eager_attention_forward
        if attention_mask is None:
            attention_mask = Mask(query.shape[2], key.shape[2]).matrix(query.device)
        additive = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
        return eager(
            module, query, key, value, additive.masked_fill(~attention_mask, torch.finfo(query.dtype).min), **kwargs
        )
    return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)


def _segments_matrix(segments: Tensor) -> Tensor:
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    return same.tril()[:, None]


def swapped_layers(config) -> set[int]:
    """The layers that the config says are swapped."""
    return {index for group in (getattr(config, NAME, None) or {}).get("swapped", ()) for index in group["layers"]}


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
        None for a plain causal mask; bool `[B, S]` for causal attention with padding; int32 `[B, S]` for packed
        texts (0: padding); bool `[B, 1, T, S]` for anything else.
    """
    grows = isinstance(q_offset, int) and kv_length + kv_offset == q_offset + q_length
    if grows and mask_function is causal_mask_function:
        if attention_mask is None:
            return None
        valid = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        return None if valid.all() else valid
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}

    def rows(start: int, stop: int) -> Tensor:
        return sdpa_mask(
            batch_size, stop - start, kv_length, q_offset + start, kv_offset, mask_function, attention_mask, **kwargs
        )

    if grows and q_offset == 0:
        segments = find_segments(rows, kv_length)
        if segments is not None:
            found = from_segments(segments)
            return segments if isinstance(found, Packed) else found.valid
    return rows(0, q_length)


def register() -> None:
    """Make the name known to transformers; done once, when the package is imported."""
    AttentionInterface.register(NAME, attnswap_attention)
    AttentionMaskInterface.register(NAME, attnswap_mask)
