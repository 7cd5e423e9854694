"""The cache layer of a swapped attention: a state of constant size in place of keys and values."""

import functools

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from . import attentions


class StateLayer(CacheLayerMixin):
    """Holds what a stateful variant remembers: tensors with the batch first, under names that the variant chooses.

    `update` counts the tokens and hands back only the new keys and values; the variant fills `state`. The mask that
    transformers makes from `get_mask_sizes` covers all tokens seen, as for a layer that keeps them.
    """

    _layer_type = "attnswap"  # the name under which transformers finds this class for a layer of the config
    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.state: dict[str, Tensor] = {}
        self.seen = 0
        self.served = 0  # tokens that the variant has taken in, of those seen
        self.packed = False  # several texts in one row went through; their states are gone

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def nbytes(self) -> int:
        """Bytes of the state; they do not depend on the number of tokens."""
        return sum(t.numel() * t.element_size() for t in self.state.values())

    def _apply(self, change) -> None:
        self.state = {name: change(t) for name, t in self.state.items()}

    def reset(self) -> None:
        self.state, self.seen, self.served, self.packed = {}, 0, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda t: t[indices])

    def offload(self) -> None:
        self._apply(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._apply(lambda t: t.to(self.device, non_blocking=True))

    def activate_past_recording(self) -> None:
        raise NotImplementedError(
            "assisted generation takes tokens back, and the state of a swapped layer cannot forget: "
            "generate without an assistant or prompt lookup"
        )

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                f"crop({tokens_to_remove}): the state of a swapped layer cannot forget tokens; start from a new cache"
            )


def state_layer(cache: Cache | None, layer: int) -> StateLayer | None:
    """The `StateLayer` of this layer in the cache that a model passes to its attention, put there at first use.

    Raises:
        NotImplementedError: a kind of cache whose layers have a fixed size.
        ValueError: the cache already holds keys and values that softmax attention put there.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None:
        return None
    while len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    found = cache.layers[layer]
    if isinstance(found, StateLayer):
        return found
    if type(found) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise NotImplementedError(
            f"layer {layer} is swapped and cannot generate with a {type(found).__name__}: "
            "use the default (dynamic) cache"
        )
    if found.get_seq_length() > 0:
        raise ValueError(
            f"the cache holds {found.get_seq_length()} tokens of softmax for layer {layer}, which is swapped: "
            "start from a new cache"
        )
    cache.layers[layer] = StateLayer()
    return cache.layers[layer]


def cache_nbytes(cache: Cache) -> int:
    """Bytes that a cache holds, keys and values or states."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            total += layer.nbytes()
        else:
            total += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values) if torch.is_tensor(t))
    return total


def _no_static_state(**kwargs):
    raise NotImplementedError("swapped layers cannot generate with a static cache: use the default (dynamic) cache")


def make_state_layers_up_front() -> None:
    """Let transformers build caches with a `StateLayer` where the config has a stateful variant, so that what such a
    layer cannot do is refused before the first token; done once, when the package is imported."""
    original = cache_utils.get_layer_types_and_kwargs
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def with_state_layers(config):
        types, arguments = original(config)
        # An encoder-decoder builds the cache of its cross-attention from the same config: those layers come later.
        if getattr(config, "is_encoder_decoder", False):
            return types, arguments
        for group in (getattr(config, "attnswap", None) or {}).get("swapped") or ():
            if group.get("kind", "causal") == "causal" and attentions.get(group["attention"]).stateful:
                for index in group["layers"]:
                    if types[index] in ("full_attention", "sliding_attention"):  # others keep more than keys and values
                        types[index], arguments[index] = StateLayer._layer_type, {}
        return types, arguments

    cache_utils.get_layer_types_and_kwargs = with_state_layers
    cache_utils.STATIC_LAYER_TYPE_MAPPING[StateLayer._layer_type] = _no_static_state
