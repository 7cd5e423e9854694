"""A model as a function of plain tensors: tokens and what is remembered go in, logits and what is now known out."""

from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..errors import UsageError
from ..integration.cache import StateLayer
from ..integration.finding import inspect
from ..ops.nodes import making_graph

POSITION, MASK = "position", "mask"
# A state of this name is the position of the text in every layer.
COUNT = "count"


class Remembered(NamedTuple):
    """Describe one tensor that is remembered: name, dtype, and shape, with names for the sizes that are open."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def empty(self, batch: int, past: int = 0) -> Tensor:
        """Return what is remembered of no token, or zeros for `past` of them."""
        sizes = {"batch": batch, "past": past}
        return torch.zeros([sizes.get(size, size) for size in self.shape], dtype=self.dtype)


class GivenState(StateLayer):
    """Hold a state that an input of a program brings; nothing is known of the tokens that it has seen."""

    _layer_type = None

    def __init__(self, state: dict[str, Tensor], seen):
        super().__init__()
        self.state, self.seen, self.is_initialized = state, seen, True

    def update(self, key_states, value_states, *args, **kwargs):
        self.seen = self.seen + key_states.shape[-2]
        return key_states, value_states

    def expect(self, layer, variant):
        """Whoever calls the program sees to it that the states are those of its layers."""

    def take_in(self, attention, mask, replay):
        """The state is taken in by the variant; nothing is checked and nothing recorded."""


class Program(nn.Module):
    """Run a model on `(input_ids, attention_mask, past)`, as `torch.export` takes it; make it in `torch.no_grad`.

    `input_ids` and `attention_mask` are int `[B, T]` and tell of the new tokens alone. `past` is a list of tensors, as
    `remembered` describes it; what comes back are the model's outputs, `outputs`, and a list of the same tensors after
    the new tokens.

    Attributes:
        remembered: in order; empty for an encoder. outputs: names of what else comes back.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.accepts = signature(model.forward).parameters
        _require_exportable(model, self.accepts)
        self.remembered: list[Remembered] = []
        self.layers: list[tuple[type, list[str]]] = []
        with making_graph():
            short, long = (self._probe(length) for length in (2, 3))
        self.outputs = [name for name, t in short.items() if torch.is_tensor(t)]
        if "past_key_values" in short:
            self._read(short.past_key_values, long.past_key_values)
        self.grows = any("past" in tensor.shape for tensor in self.remembered)
        if self.remembered:
            own = [Remembered(POSITION, torch.long, ("batch",))]
            own += [Remembered(MASK, torch.long, ("batch", "past"))] if self.grows else []
            self.remembered = own + self.remembered

    def _probe(self, length: int):
        given = torch.ones(1, length, dtype=torch.long)
        cached = {"use_cache": True} if "past_key_values" in self.accepts else {}
        return self.model(input_ids=given, attention_mask=given, **cached)

    def _read(self, short: DynamicCache, long: DynamicCache) -> None:
        """Describe what a cache holds: sizes that differ after two tokens and after three are open."""
        for index, layers in enumerate(zip(short.layers, long.layers, strict=True)):
            one, other = (_tensors(layer, index) for layer in layers)
            kind = GivenState if isinstance(layers[0], StateLayer) else DynamicLayer
            self.layers.append((kind, list(one)))
            for name, t in one.items():
                sizes = zip(t.shape[1:], other[name].shape[1:], strict=True)
                shape = ("batch", *(a if a == b else "past" for a, b in sizes))
                if not name.endswith(COUNT):
                    self.remembered.append(Remembered(f"{index}.{name}", t.dtype, shape))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        if not self.remembered:
            found = self.model(input_ids=input_ids, attention_mask=attention_mask)
            return [found[name] for name in self.outputs], []
        given = dict(zip((tensor.name for tensor in self.remembered), past, strict=True))
        position = given[POSITION]
        # A state tells nothing of how many tokens it has seen, and nobody asks unless keys are kept beside it.
        seen = given[MASK].shape[1] if self.grows else 0
        self._tie_sizes(input_ids, attention_mask, past, seen)
        mask = torch.cat([given[MASK], attention_mask], 1) if self.grows else attention_mask
        cache = DynamicCache()
        for index, (kind, names) in enumerate(self.layers):
            own = {name: position if name.endswith(COUNT) else given[f"{index}.{name}"] for name in names}
            cache.layers.append(GivenState(own, seen) if kind is GivenState else _keys_and_values(**own))
        found = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0) + position[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        now = {POSITION: position + attention_mask.sum(1), MASK: mask}
        for index, layer in enumerate(cache.layers):
            now |= {f"{index}.{name}": t for name, t in _tensors(layer, index).items()}
        return [found[name] for name in self.outputs], [now[tensor.name] for tensor in self.remembered]

    def _tie_sizes(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor], seen) -> None:
        """Say which open sizes are the same, so that what is derived from them is compared as such."""
        sizes = {"batch": input_ids.shape[0], "past": seen}
        torch._check(attention_mask.shape[0] == input_ids.shape[0])
        torch._check(attention_mask.shape[1] == input_ids.shape[1])
        for described, t in zip(self.remembered, past, strict=True):
            for size, found in zip(described.shape, t.shape, strict=True):
                if size in sizes:
                    torch._check(found == sizes[size])


def _require_exportable(model: PreTrainedModel, accepts) -> None:
    """Raise UsageError where a model needs more than tokens, or remembers what no input of a graph could bring."""
    name = type(model).__name__
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        what = "is an encoder-decoder" if model.config.is_encoder_decoder else f"reads {model.main_input_name}"
        raise UsageError(f"a {name} cannot be exported: it {what}; decoders and encoders of tokens can")
    if "past_key_values" in accepts and "position_ids" not in accepts:
        raise UsageError(f"a {name} cannot be exported: it takes no position_ids, which the graph counts for each text")
    for entry in inspect(model):
        if entry.reach.tokens is not None:
            raise UsageError(f"a {name} cannot be exported: {entry.name} sees {entry.reach} alone")


def _keys_and_values(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _tensors(layer, index: int) -> dict[str, Tensor]:
    """Return what a layer of a cache holds; UsageError where that is neither a state nor keys and values."""
    if isinstance(layer, StateLayer):
        return layer.state
    if type(layer) is not DynamicLayer:
        raise UsageError(f"layer {index} keeps a {type(layer).__name__}, which cannot be exported")
    return {"keys": layer.keys, "values": layer.values}
