"""The cache layer of a swapped attention: a state of constant size in place of keys and values."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from .. import attentions
from ..attentions import Attention
from ..config import NAME
from ..masks import Mask, Packed, parse, values_are_hidden
from ..plans import layers_in

Replay = Callable[[dict[str, Tensor], int], object]


class Past(NamedTuple):
    """Hold what one call changed: how many tokens came before it, the state before it, and how to take it in again."""

    seen: int
    state: dict[str, Tensor]
    replay: Replay


ANOTHER_PAST = (
    "attention_mask hides earlier tokens that the state of the layer has taken in, or shows some that it has not, "
    "and a state cannot follow: start from a new cache, or use a variant on the scores, which keeps keys and values"
)
UNDER_FUNC = (
    "under torch.func nobody can look whether attention_mask agrees with what the state of the layer has taken in: "
    "leave attention_mask out where nothing is padded, or call the model with use_cache=False"
)


class OnceForAllLayers:
    """Call a function of two tensors once, for all layers that ask for the same two one after the other."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]):
        self.function = function
        self.last: tuple[Callable, Callable, Any] = (lambda: None, lambda: None, None)

    def __call__(self, a: Tensor, b: Tensor) -> Any:
        last = self.last
        if last[0]() is not a or last[1]() is not b:
            last = self.last = weakref.ref(a), weakref.ref(b), self.function(a, b)
        return last[2]


_same_rows = OnceForAllLayers(lambda valid, taken: torch.equal(valid[:, : taken.shape[1]], taken.to(valid.device)))
_reordered = OnceForAllLayers(lambda taken, beam_idx: taken.index_select(0, beam_idx.to(taken.device)))


class StateLayer(CacheLayerMixin):
    """Hold what a stateful variant remembers: tensors with the batch first, under names that the variant chooses.

    `update` counts the tokens and hands back only the new keys and values; the variant fills `state`. The mask that
    transformers makes from `get_mask_sizes` covers all tokens seen, as for a layer that keeps them.

    A state cannot forget: a mask that says something else of earlier tokens than `taken` is refused.

    Attributes:
        taken: which of the tokens the variant took in, bool `[B, served]`, shared by the layers; None for all.
        filled_by: the variant and its options, in words.
        fixed_size: whether masks may have more columns than there are tokens, as the cache around has one size.
    """

    # Names under which transformers finds a class for a layer of the config: see `with_state_layers`.
    _layer_type = "attnswap"
    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, beside_keys: bool = False, max_cache_len: int | None = None):
        """Make an empty layer.

        Args:
            beside_keys: whether other layers of the cache keep keys and values, for which masks are made too.
            max_cache_len: the size of those layers; None in a cache that grows.
        """
        super().__init__()
        self.state: dict[str, Tensor] = {}
        self.seen = 0
        self.served = 0  # tokens that the variant has taken in, of those seen
        self.taken: Tensor | None = None
        self.filled_by = ""
        self.awaited = False  # the next keys come from the module of a stateful variant
        self.closed = ""  # what went through and left no state, in words
        self.fixed_size = max_cache_len is not None
        self.mask_length = max_cache_len if beside_keys else None
        self.record_past = False
        self.past: list[Past] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note the dtype and the device of the first keys; the variant makes the state itself."""
        self.dtype, self.device = key_states.dtype, key_states.device
        # Mllama looks whether a layer has keys.
        self.keys = self.values = torch.tensor([], dtype=self.dtype, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Count the new tokens, and return their keys and values as they came.

        Raises:
            ValueError: the module that calls keeps keys and values, or tokens of an earlier call were never taken in.
        """
        self._check_turn()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def _check_turn(self) -> None:
        """Raise ValueError where the next keys are not those that this layer waits for."""
        if self.begun and not self.awaited:
            raise ValueError(
                f"the cache is made for the state of {self.filled_by or 'a swapped layer'}, and this layer of the "
                "model keeps keys and values: start from a new cache"
            )
        if self.pending:
            raise ValueError("an earlier call with this cache failed half-way: start from a new cache")

    @property
    def begun(self) -> bool:
        """Return whether tokens have come."""
        return self.seen > 0

    @property
    def pending(self) -> bool:
        """Return whether tokens have come that the variant has not taken in yet."""
        return self.served != self.seen

    @property
    def continues(self) -> bool:
        """Return whether the variant has taken in tokens."""
        return self.served > 0

    def read(
        self, attention_mask: Tensor | None, query_length: int, causal: bool, window: int | None, asker: object
    ) -> Mask | Packed:
        """Return what the mask of a call says, whose keys `update` has counted; arguments as in `masks.parse`."""
        return parse(
            attention_mask, query_length, self.seen, causal, longer=self.fixed_size, window=window, asker=asker
        )

    def remembered(self) -> dict[str, Tensor]:
        """Return the state of the tokens taken in, which the variant reads and fills; empty where there are none."""
        return self.state

    def keep(self, attention: Attention, state: dict[str, Tensor]) -> None:
        """Remember the state that `attention` has filled."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that a mask covers, those of the new tokens included, and where they begin."""
        return self.mask_length or self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many tokens have come."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: any number of tokens may come."""
        return -1

    def nbytes(self) -> int:
        """Return the bytes of the state, which grow with the tokens only where some groups of the layer keep keys."""
        return sum(t.numel() * t.element_size() for t in self.state.values())

    def _apply(self, change) -> None:
        self.state = {name: change(t) for name, t in self.state.items()}

    def _select(self, change, change_taken=None) -> None:
        self._apply(change)
        if self.taken is not None:
            self.taken = (change_taken or change)(self.taken)
        self.past = []  # of other rows

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen, self.served, self.past = {}, 0, 0, []
        self.taken, self.filled_by, self.awaited, self.closed = None, "", False, ""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows that beam search goes on with, `[B]`."""
        self._select(lambda t: t.index_select(0, beam_idx.to(t.device)), lambda t: _reordered(t, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        self._select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._select(lambda t: t[indices])

    def offload(self) -> None:
        """Move the state to the CPU."""
        self._apply(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the state back to the device of the layer."""
        self._apply(lambda t: t.to(self.device, non_blocking=True))

    def activate_past_recording(self) -> None:
        """Remember, from now on and until the next `crop`, what is needed to take tokens back."""
        self.record_past = True

    def expect(self, layer: int, variant: str) -> None:
        """Be ready for the keys of the module of this layer, whose variant and its options are given in words.

        Raises:
            ValueError: the state is that of another variant.
        """
        if self.begun and self.filled_by != variant:
            raise ValueError(
                f"the cache holds {self.seen} tokens as the state of {self.filled_by} for layer {layer}, which runs "
                f"{variant}: start from a new cache"
            )
        self.filled_by, self.awaited = variant, True

    def take_in(self, attention: Attention, mask: Mask | Packed, replay: Replay) -> None:
        """Note that the variant takes in all tokens seen, and what is needed to take them back, where that is recorded.

        Args:
            attention: the variant.
            mask: what the call says of all tokens.
            replay: takes in the first n of the new tokens again, into a state as it was.

        Raises:
            NotImplementedError: the mask says something of earlier tokens that the state cannot follow.
        """
        one_state = self._admits(attention, mask)
        if one_state and not attention.any_mask:
            self._check_past(mask.valid)
            self.taken = mask.valid
        if self.record_past and one_state:
            self.past.append(Past(self.served, dict(self.state), replay))
        self.served, self.awaited = self.seen, False

    def _admits(self, attention: Attention, mask: Mask | Packed) -> bool:
        """Return whether the tokens of a call become a state that later calls go on with.

        Raises:
            NotImplementedError: they cannot follow what the cache holds.
        """
        if not self.pending:
            raise NotImplementedError("its module calls its attention twice per token, and the state takes each once")
        if self.closed:
            raise NotImplementedError(
                f"the cache holds {self.closed}, which cannot be continued: start from a new cache"
            )
        one_state = isinstance(mask, Mask) and (mask.causal or attention.any_mask)
        if not one_state:
            self.closed = "packed texts" if isinstance(mask, Packed) else "a text that was read in both directions"
            if self.continues:
                raise NotImplementedError(f"{self.closed} cannot continue a past: start from a new cache")
        return one_state

    def _check_past(self, valid: Tensor | None) -> None:
        """Raise NotImplementedError where `valid`, bool `[B, seen]`, is not about the past what `taken` is."""
        taken = self.taken
        if not self.served or valid is None and taken is None:
            return
        if valid is not None and taken is not None and not values_are_hidden():
            same = _same_rows(valid, taken)
        else:
            differs = False if valid is None else ~valid[:, : self.served]
            differs = differs ^ (False if taken is None else ~taken)
            if values_are_hidden():
                if torch.compiler.is_compiling():
                    torch._assert_async(~differs.any(), ANOTHER_PAST)
                elif torch._C._are_functorch_transforms_active():
                    raise NotImplementedError(UNDER_FUNC)
                return
            same = not differs.any()
        if not same:
            raise NotImplementedError(ANOTHER_PAST)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back, or, given a positive number, all but that many.

        A state cannot forget, so an earlier one is taken and the tokens that stay are taken in again.

        Raises:
            NotImplementedError: tokens from before the recording, or before the last `crop`.
        """
        stay = max(0, self.seen + tokens_to_remove) if tokens_to_remove <= 0 else min(self.seen, tokens_to_remove)
        if stay < self.seen:
            past = next((past for past in reversed(self.past) if past.seen <= stay), None)
            if past is None:
                raise NotImplementedError(
                    f"crop({tokens_to_remove}): the state of a swapped layer cannot forget tokens from before "
                    "activate_past_recording or the last crop: start from a new cache"
                )
            self.state = dict(past.state)
            if stay > past.seen:
                past.replay(self.state, stay - past.seen)
            self.seen = self.served = stay
            self.taken = None if self.taken is None else self.taken[:, :stay]
        self.past = []


class StateAndConvolutionLayer(StateLayer, LinearAttentionAndFullAttentionLayer):
    """Hold the state of a variant beside the convolutions and recurrent states that a layer of a hybrid model has."""

    _layer_type = None
    is_croppable = LinearAttentionLayer.is_croppable

    @classmethod
    def instead_of(cls, layer: LinearAttentionLayer) -> "StateAndConvolutionLayer":
        """Return a layer with the convolutions and recurrent states of `layer`, which holds no keys yet."""
        new = cls()
        vars(new).update(vars(layer))
        return new

    def lazy_initialization(self, *keys_and_values, **states) -> None:
        """Make room for states that come by keyword; note the dtype and the device of keys."""
        (StateLayer if keys_and_values else LinearAttentionLayer).lazy_initialization(self, *keys_and_values, **states)

    def _apply(self, change) -> None:
        super()._apply(change)
        for states in (self.conv_states, self.recurrent_states):
            states.update({index: change(t) for index, t in states.items() if t is not None})

    def reset(self) -> None:
        """Forget everything."""
        StateLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        StateLayer.crop(self, tokens_to_remove)


def state_layer(cache: Cache | None, layer: int, attention: Attention) -> StateLayer | None:
    """Return the `StateLayer` of this layer in the cache that a model passes to its attention, put there at first use.

    Args:
        attention: the variant of the layer.

    Raises:
        NotImplementedError: a kind of cache whose layers have a fixed size.
        ValueError: the cache already holds keys and values that softmax attention put there, or the state of another
            variant.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None:
        return None
    while len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    found = cache.layers[layer]
    if isinstance(found, StateLayer):
        if found.is_compileable and attention.reach is not None and not found.begun:
            # Its state grows up to the window, which the config does not tell.
            found = cache.layers[layer] = StateLayer(found.mask_length is not None, found.max_cache_len)
        found.expect(layer, attention.described)
        return found
    beside = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
    if type(found) not in (DynamicLayer, DynamicSlidingWindowLayer, *beside):
        raise NotImplementedError(
            f"layer {layer} is swapped and cannot generate with a {type(found).__name__}: "
            "use the default (dynamic) cache"
        )
    if found.get_seq_length() > 0:
        raise ValueError(
            f"the cache holds {found.get_seq_length()} tokens of softmax for layer {layer}, which is swapped: "
            "start from a new cache"
        )
    new = StateAndConvolutionLayer.instead_of(found) if isinstance(found, beside) else StateLayer()
    new.expect(layer, attention.described)
    cache.layers[layer] = new
    return new


def cache_nbytes(cache: Cache) -> int:
    """Return the bytes that a cache holds, keys and values or states."""
    total = 0
    for layer in cache.layers:
        kept = [vars(layer).get("keys"), vars(layer).get("values")]
        for states in ("state", "conv_states", "recurrent_states"):
            kept += vars(layer).get(states, {}).values()
        total += sum(t.numel() * t.element_size() for t in kept if torch.is_tensor(t))
    return total


# The name of a state layer whose window slides, or whose keys another layer uses: its tensors grow.
GROWS = f"{StateLayer._layer_type}_grows"


def with_state_layers(original):
    """Wrap transformers' `get_layer_types_and_kwargs`: caches begin with a `StateLayer` where the config has a stateful
    variant, so that what such a layer cannot do is refused before the first token."""

    @functools.wraps(original)
    def layer_types_and_kwargs(config):
        types, arguments = original(config)
        # Where there is cross-attention, its cache is built from the same config: the layers with a state come later.
        if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
            return types, arguments
        # Of a layer that uses the keys of another, transformers has a dummy. Others keep more than keys and values.
        known = ("full_attention", "sliding_attention", "dummy")
        found = [index for index in _stateful_layers(config) if index < len(types) and types[index] in known]
        # Layers of one cache take the same masks, whose sizes are those of its first layer.
        full = all(types[index] == "full_attention" for index in found)
        for index in found:
            types[index] = StateLayer._layer_type if full else GROWS
            arguments[index] = {"beside_keys": len(found) < len(types)}
        return types, arguments

    return layer_types_and_kwargs


def _stateful_layers(config) -> list[int]:
    """Return the layers that run a stateful variant, in their own past."""
    groups = (getattr(config, NAME, None) or {}).get("swapped") or ()
    causal = (group for group in groups if group.get("kind", "causal") == "causal")
    return sorted(
        {index for group in causal if attentions.get(group["attention"]).stateful for index in layers_in(group)}
    )
