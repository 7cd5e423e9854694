"""Group the attention layers of a model by what they cost, and say what each keeps of a text."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..attentions import Attention
from ..attentions.base import State
from ..attentions.softmax import Softmax
from ..config import NAME
from ..integration.finding import head_shape, inspect
from ..masks import Mask
from .trace import trace


class Layer(NamedTuple):
    """Describe the attention of a layer: its variant, and the sliding window of the layer, None where it has none."""

    attention: Attention
    window: int | None


Layers = list[tuple[Layer, int]]  # each with how many there are


def layers_of(model: PreTrainedModel) -> Layers:
    """Return the kinds of attention layers of a model, each with how many layers there are of it.

    Layers that keep softmax are among them; those that cannot be swapped are not, as they are counted by running them.
    """
    found = []
    for entry in inspect(model):
        if entry.reason is None:
            attention = getattr(entry.module, NAME, None)
            if attention is None:
                attention = Softmax(head_shape(model, [entry]))
                attention.kind = entry.kind
            found.append((Layer(attention, entry.reach.sliding_window), 1))
    return _alike(found)


def as_softmax(layers: Layers) -> Layers:
    """Return the same layers with softmax in each."""
    found = []
    for (attention, window), count in layers:
        softmax = Softmax(attention.heads)
        softmax.kind = attention.kind
        found.append((Layer(softmax, window), count))
    return _alike(found)


def _alike(layers: Iterable[tuple[Layer, int]]) -> Layers:
    """Return the same layers, those that cost the same as one entry."""
    found: dict[tuple[str, int | None], tuple[Layer, int]] = {}
    for layer, count in layers:
        key = signature(layer.attention), layer.window
        first, before = found.get(key, (layer, 0))
        found[key] = first, before + count
    return list(found.values())


def signature(attention: Attention) -> str:
    """Return in words all on which the cost of a variant depends, beside the text."""
    return f"{attention.name} {attention.choice()} {attention.heads} {attention.kind}"


def cache_bytes(layers: Layers, length: int, dtype: torch.dtype) -> int:
    """Return the bytes that the cache of one text holds after `length` tokens, from shapes."""
    return sum(count * kept_bytes(layer, length, dtype) for layer, count in layers)


@functools.lru_cache(maxsize=256)
def kept_bytes(layer: Layer, length: int, dtype: torch.dtype) -> int:
    """Return the bytes that a layer keeps of one text of `length` tokens: its state, or its keys and values."""
    attention, heads = layer.attention, layer.attention.heads
    if not attention.stateful:
        tokens = min(length, layer.window - 1) if layer.window else length  # the new token is not kept in between
        return tokens * heads.num_key_value_heads * (heads.head_dim + heads.value_dim) * dtype.itemsize
    shapes = (
        (heads.num_attention_heads, heads.head_dim),
        (heads.num_key_value_heads, heads.head_dim),
        (heads.num_key_value_heads, heads.value_dim),
    )
    query, key, value = (torch.empty(1, count, length, dim, dtype=dtype, device="meta") for count, dim in shapes)
    state = State()
    with torch.no_grad():
        trace(lambda: attention(query, key, value, Mask(length, length, window=layer.window), 1.0, state))
    return sum(t.numel() * t.element_size() for t in state.values())
