"""The attention function: what transformers calls, by its name, for every attention module of a swapped model."""

import contextlib
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.output_capturing import _active_collector

from ..attentions import Attention, Heads
from ..attentions.softmax import Softmax
from ..config import MARKER, NAME
from ..errors import UsageError
from ..masks import Mask, Packed, unpack_rows, values_are_hidden
from .cache import StateLayer
from .read_mask import ANY_MASK, read_mask
from .rotations import rotation_of
from .sharing import uses_keys_of_another
from .sliding import sliding_window

# Keywords that models pass to their attention function and that change nothing about what a row attends to here:
# sliding_window is already in the mask, is_causal says what a missing mask means, shift_labels is for the loss,
# tokenizer for the stop strings of generate.
_HARMLESS = frozenset(
    "position_ids cache_position use_cache output_hidden_states output_router_logits return_dict num_items_in_batch "
    "input_ids grid_thw is_causal sliding_window output_attentions logits_to_keep shift_labels ignore_index "
    "deterministic tokenizer".split()
)
# Keywords that `read_mask` turns into a part of the mask, which the variant honours or refuses.
_HONOURED = frozenset(
    "position_bias softcap s_aux sinks cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k seq_idx".split()
)
# Keywords that change the result and that nothing here honours.
_REFUSED = {
    "head_mask": "a mask over heads",
    "cache": "a paged cache",
    "indices": "the keys that sparse attention has chosen",
    "block_indices": "the blocks that sparse attention has chosen",
}


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
    """Compute the attention of one module of a model that has swapped layers; transformers calls this function.

    Args:
        module: the attention module; its `attnswap` is the variant, absent where the layer keeps softmax.
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`.
        attention_mask: what `attnswap_mask` returned, or a mask that the user made.

    Returns:
        `[B, T, H, Dv]`, and the weights `[B, H, T, S]` where `output_attentions` asks for them, else None.

    Raises:
        NotImplementedError: a mask or keyword that the variant cannot honour, with the layer.
        RuntimeError: the config says that this layer is swapped and the module carries no variant; or the texts are
            sharded over processes.
        ValueError: a mask that does not fit query and key.
    """
    _check_whole_texts()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attention: Attention | None = getattr(module, NAME, None)
    layer, turned = kwargs.pop("attnswap_state", None), kwargs.pop("attnswap_rotation", None)
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
    if layer is not None and uses_keys_of_another(module):
        layer.update(key, value)  # which the module leaves out
    window = sliding_window(module, attention, kwargs)
    _check_window(where, attention, window, key if layer is None else layer)
    _check_heads(where, attention, query, key, value)
    device = query.device.type
    precision = contextlib.nullcontext()
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # Models leave the three in different dtypes there; inside, each op chooses its own precision.
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
        precision = torch.autocast(device, enabled=False)
    try:
        with precision:
            mask = read_mask(module, attention, query, key, attention_mask, layer, kwargs)
            if turned is not None:
                rotation = rotation_of(module._attnswap_rotary, turned, query, key.shape[2])
                mask = replace(mask, rotation=rotation)
            rows = query.shape[2]
            if attention.stateful and isinstance(mask, Mask) and mask.causal and rows < key.shape[2]:
                # Gemma 4 asks its last layers for the last rows alone; a recurrence goes through all of them.
                query = F.pad(query, (0, 0, key.shape[2] - rows, 0))
                mask = replace(mask, query_length=key.shape[2])
            out = attend(attention, query, key, value, mask, scaling, layer)[:, :, -rows:]
            weights = _weights(attention, query, key, mask, scaling, layer)[:, :, -rows:] if _wanted(kwargs) else None
    except (NotImplementedError, ValueError) as error:
        # Plain steps, which torch.compile follows, so that whoever compiles reads this error and not one of its own.
        kind = UsageError if isinstance(error, UsageError) else ValueError
        if isinstance(error, NotImplementedError):
            kind = NotImplementedError
        raise kind(f"{where}: {error}") from error
    return out.transpose(1, 2).contiguous(), weights


def attend(attention: Attention, query, key, value, mask: Mask | Packed, scaling, layer=None) -> Tensor:
    """Run one variant on the tensors of one call, and return its result `[B, H, T, Dv]`.

    Args:
        layer: the `StateLayer` of a generating call, whose `state` the variant reads and fills.
    """
    stateful = attention.stateful and layer is not None
    if stateful:

        def replay(state: dict[str, Tensor], tokens: int) -> None:
            seen = mask.offset + tokens
            valid = None if mask.valid is None else mask.valid[:, :seen]
            new = (t[:, :, :tokens] for t in (query, key, value))
            rotation = None if mask.rotation is None else mask.rotation.tokens(slice(0, tokens))
            attention.answer(*new, Mask(tokens, seen, valid, rotation=rotation, window=mask.window), scaling, state)

        layer.take_in(attention, mask, replay)
    if isinstance(mask, Packed):

        def one(query, key, value, valid, *turns):
            rotation = mask.rotation.of(*turns) if turns else None
            valid = None if mask.causal else valid
            of_texts = Mask(query.shape[2], key.shape[2], valid, causal=mask.causal, rotation=rotation)
            if mask.window is not None and mask.window < key.shape[2]:
                of_texts = replace(of_texts, window=mask.window)
            return attention.answer(query, key, value, of_texts, scaling)

        turns = () if mask.rotation is None else (mask.rotation.turns,)
        return unpack_rows(one, query, key, value, mask.segments, *turns)
    if not stateful:
        return attention.answer(query, key, value, mask, scaling)
    state = layer.remembered()
    out = attention.answer(query, key, value, mask, scaling, state)
    layer.keep(attention, state)
    return out


def _wanted(kwargs: dict) -> bool:
    """Whether the caller wants the weights: not every model passes `output_attentions` down to its attention."""
    collected = () if torch.compiler.is_compiling() else _active_collector.get() or ()
    return bool(kwargs.get("output_attentions")) or any("attentions" in name for name in collected)


def _weights(attention, query, key, mask, scaling, layer) -> Tensor:
    if attention.stateful and layer is not None and layer.seen > key.shape[2]:
        raise NotImplementedError(
            "output_attentions needs all keys, and a state has forgotten them: call the model with use_cache=False"
        )
    if any(parameter.is_meta for parameter in attention.parameters(recurse=False)):
        raise NotImplementedError("output_attentions is not supported while the parameters of the layer are offloaded")
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


def _check_whole_texts() -> None:
    """Raise RuntimeError under context parallelism: torch then puts a function of its own in the place of SDPA."""
    if not values_are_hidden() and F.scaled_dot_product_attention.__module__.startswith("torch.distributed"):
        raise RuntimeError(
            "the model has swapped attention, and each process holds a part of every text (context parallelism), which "
            "torch knows for softmax alone: train with data parallelism (cp_size=1), or call hf_attnswap.restore(model)"
        )


def _check_window(where: str, attention: Attention, window: int | None, tokens: Tensor | StateLayer) -> None:
    # In a mask for one new token, a window over the past looks like padding in it.
    if window is None or attention.any_mask or attention.slides:
        return
    length = tokens.seen if isinstance(tokens, StateLayer) else tokens.shape[2]
    if length > window:
        raise NotImplementedError(
            f"{where}: cannot honour the model's sliding window of {window} over {length} tokens: "
            f"{ANY_MASK} take any mask"
        )


def _check_heads(where: str, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> None:
    heads = attention.heads
    # Tuples, because a Heads takes longer to make than all other checks of a step together.
    expected = heads.num_attention_heads, heads.num_key_value_heads, heads.head_dim, heads.value_dim
    found = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    if found != expected and attention.state_dict().keys() - {MARKER}:
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
