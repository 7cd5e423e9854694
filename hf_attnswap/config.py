"""Which attention goes where: what the user says, what is saved in config.json."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import attentions
from .attentions.base import KINDS
from .errors import UsageError, shown
from .plans import NAME, Choice, Plan, parse_place

# The name that stands in config.json: where this package is not imported, transformers' error quotes it.
GUARD = "attnswap: pip install hf_attnswap, then import hf_attnswap"
# The entries of config.json that hold it. Users and programs override the first one; the second is checked for every
# model, with experts or without.
GUARDED = ("attn_implementation", "experts_implementation")

# Stands before the name of the class in config.json: programs that go by the name alone know no such model.
ARCHITECTURE = "Attnswap"
# The tensor of each swapped layer that is there even where a variant has no parameters: programs that take the weights
# strictly stop at it.
MARKER = "marker"

# What a group runs that a plan does not name.
KEPT: Choice = ("softmax", {})


@dataclass
class SwapConfig:
    """Describe a swap, as the user does.

    Attributes:
        attention: name of a variant, see `hf_attnswap.available()`.
        layers: None for all layers; a list of indices; a slice string such as "1::2"; or a dict from an index, slice
            string or place ("18.2": key/value group 2 of layer 18) to an attention name or to `{"attention": name,
            option: value, ...}`, which leaves all other layers and groups as they are. A place overrides its layer.
        options: options of the variant; those that a dict in `layers` gives win.
        kinds: which attention of these layers: "causal" (a text to its own past), "bidirectional" (to itself), "cross"
            (to another, as decoders to their encoder).
        keep: places that keep softmax in layers that are otherwise swapped, such as `["18.2", "8.0"]`. A model without
            grouped queries has one group per head.
    """

    attention: str = "hedgehog+window"
    layers: None | Sequence[int] | str | Mapping[int | str, Any] = None
    options: dict[str, Any] = field(default_factory=dict)
    kinds: Sequence[str] = ("causal", "bidirectional")
    keep: Sequence[str] | None = None

    def __post_init__(self):
        if not isinstance(self.options, Mapping):
            raise UsageError(f"options is {shown(self.options)}; expected a dict from option to value")
        if not isinstance(self.kinds, Iterable):
            raise UsageError(f"kinds is {shown(self.kinds)}; expected some of {', '.join(KINDS)}")
        self.kinds = (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)
        for kind in self.kinds:
            if kind not in KINDS:
                raise UsageError(f"kinds has {shown(kind)}; expected some of {', '.join(KINDS)}")
        if not self.kinds:
            raise UsageError("kinds is empty; leave it out to swap all self-attention")
        if self.keep is not None:
            if not isinstance(self.keep, Sequence) or isinstance(self.keep, str):
                raise UsageError(f"keep is {shown(self.keep)}; expected a list of places such as ['18.2', '8.0']")
            if not self.keep:
                raise UsageError("keep is empty; leave it out to keep no group on softmax")
            for place in self.keep:
                parse_place(place, "keep")

    def plan(self, groups: Mapping[int, int | None]) -> Plan:
        """Return for each of these layers that is to be swapped the variant and all its options with their values.

        Args:
            groups: the number of key/value groups of each layer; None where it cannot be read.

        Raises:
            UsageError: an unknown variant, option, layer or group; a layer or group named twice; or nothing is left to
                be swapped.
        """
        whole, parted = self._chosen(groups)
        for place in self.keep or ():
            layer, group = _find(place, groups, "keep")
            if (layer, group) in parted:
                raise UsageError(f"keep has {shown(place)}, which is named twice")
            if layer not in whole and all(at != layer for at, _ in parted):
                raise UsageError(f"keep has {shown(place)}, but layer {layer} is not swapped: it keeps softmax anyway")
            parted[layer, group] = KEPT
        plan: Plan = {}
        for layer in sorted({*whole, *(layer for layer, _ in parted)}):
            count = groups[layer] or 0
            if all((layer, group) not in parted for group in range(count)):
                plan[layer] = whole[layer]
                continue
            by_group = {group: parted.get((layer, group), whole.get(layer, KEPT)) for group in range(count)}
            swapped = {group: choice for group, choice in by_group.items() if choice[0] != KEPT[0]}
            first = next(iter(swapped.values()), None)
            if first is not None:
                same = len(swapped) == count and all(choice == first for choice in swapped.values())
                plan[layer] = first if same else swapped
        if not plan:
            raise UsageError("the plan keeps every group on softmax, which leaves nothing to swap")
        return plan

    def _chosen(self, groups: Mapping[int, int | None]) -> tuple[dict[int, Choice], dict[tuple[int, int], Choice]]:
        """Return what `layers` says, by layer, and by layer and group."""
        if isinstance(self.layers, Mapping):
            if not self.layers:
                raise UsageError("layers is empty; leave it out to swap all layers")
            named: list[tuple[Any, str, dict[str, Any]]] = [
                (place, *self._choice(given)) for place, given in self.layers.items()
            ]
        else:
            named = [(self.layers, self.attention, self.options)]
        whole: dict[int, Choice] = {}
        parted: dict[tuple[int, int], Choice] = {}
        used: set[str] = set()
        for place, name, given in named:
            cls = _get(name)
            used |= set(cls.options()) & set(given)
            try:
                options = cls.check_options(
                    {n: v for n, v in given.items() if n in cls.options()}
                    if isinstance(self.layers, Mapping)
                    else given
                )
            except ValueError as error:
                raise UsageError(str(error)) from None
            if isinstance(self.layers, Mapping) and ("." in place if isinstance(place, str) else type(place) is float):
                at = _find(place, groups, "layers")
                if at in parted:
                    raise UsageError(f"layers names group {at[0]}.{at[1]} twice")
                parted[at] = (name, options)
                continue
            for layer in select(place, list(groups)):
                if layer in whole:
                    raise UsageError(f"layers names layer {layer} twice")
                whole[layer] = (name, options)
        unused = set(self.options) - used
        if unused:
            raise UsageError(f"option {min(unused, key=str)!r} belongs to none of the attentions in layers")
        return whole, parted

    def _choice(self, given: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if isinstance(given, str):
            return given, self.options
        if not isinstance(given, Mapping):
            raise UsageError(
                f"layers gives {shown(given)} for a layer; expected a name or a dict with attention and options"
            )
        own = {n: v for n, v in given.items() if n != "attention"}
        name = given.get("attention", self.attention)
        unknown = set(own) - set(_get(name).options())
        if unknown:
            raise UsageError(f"{name} has no option {min(unknown, key=str)!r}")
        return name, {**self.options, **own}


def _find(place: Any, groups: Mapping[int, int | None], where: str) -> tuple[int, int]:
    """Return layer and group of a place; UsageError where the model has no such layer or group."""
    layer, group = parse_place(place, where)
    layer = layer + len(groups) if layer < 0 else layer
    if layer not in groups:
        raise UsageError(f"{where} has {shown(place)}, but the model's attention layers are {_span(list(groups))}")
    count = groups[layer]
    if count is None:
        raise UsageError(f"{where} has {shown(place)}, but the number of heads of layer {layer} cannot be read")
    if group >= count:
        raise UsageError(f"{where} has {shown(place)}, but layer {layer} has key/value groups 0 to {count - 1}")
    return layer, group


def known_architectures(config: Mapping[str, Any]) -> list[Any]:
    """Return the names of classes of transformers that a config.json holds, as they are without `ARCHITECTURE`."""
    names = config.get("architectures")
    if NAME not in config or not isinstance(names, list):
        return names if isinstance(names, list) else []
    return [name.removeprefix(ARCHITECTURE) if isinstance(name, str) else name for name in names]


def select(layers: None | Sequence[int] | str | int, indices: Sequence[int]) -> list[int]:
    """Return the indices that `layers` names; negative indices count from the end.

    Raises:
        UsageError: an index that the model does not have, or a slice that selects nothing.
    """
    indices = list(indices)
    if layers is None:
        return indices
    if isinstance(layers, str) and ":" in layers:
        try:
            chosen = indices[slice(*(int(part) if part.strip() else None for part in layers.split(":")))]
        except (ValueError, TypeError):
            raise UsageError(f"layers is {shown(layers)}; expected a slice such as '1::2'") from None
        if not chosen:
            raise UsageError(f"layers {shown(layers)} selects none of the {len(indices)} layers")
        return chosen
    if not isinstance(layers, Iterable | int):
        raise UsageError(f"layers is {shown(layers)}; expected indices or a slice such as '1::2'")
    chosen = []
    for layer in [layers] if isinstance(layers, int | str) else layers:
        try:
            if isinstance(layer, bool | float):
                raise TypeError
            index = int(layer)
        except (TypeError, ValueError):
            raise UsageError(f"layers has {shown(layer)}; expected an index or a slice such as '1::2'") from None
        if (index + len(indices) if index < 0 else index) not in indices:
            raise UsageError(f"layers has {shown(index)}, but the model's attention layers are {_span(indices)}")
        chosen.append(index + len(indices) if index < 0 else index)
    if not chosen:
        raise UsageError("layers is empty; leave it out to swap all layers")
    return chosen


def _span(indices: list[int]) -> str:
    contiguous = bool(indices) and indices == list(range(indices[0], indices[-1] + 1))
    return f"{indices[0]} to {indices[-1]}" if contiguous else ", ".join(map(str, indices))


def _get(name: Any) -> type[attentions.Attention]:
    if not isinstance(name, str):
        raise UsageError(f"attention is {shown(name)}; expected a name, see `attnswap ls`")
    try:
        return attentions.get(name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def layers_of(text: str | None) -> Any:
    """Return layers as `SwapConfig` takes them: "0,2" as a list, JSON as a dict, a slice as it is, None for None."""
    if text is None:
        return None
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError(f"layers is {shown(text)}, which is not JSON") from None
    return text if ":" in text else [part.strip() for part in text.split(",")]


def places_of(text: str | None) -> list[str] | None:
    """Return the places that a text names, such as "18.2,8.0"; None for None."""
    return None if text is None else [place.strip() for place in text.split(",")]


def parse_options(assignments: list[str]) -> dict[str, Any]:
    """Return options such as `["window=64", "shift=none"]` as a dict.

    A value is read as JSON where it is JSON, else as text.

    Raises:
        UsageError: an option without a value.
    """
    options: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"option {shown(assignment)} has no value; expected name=value")
        try:
            options[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except (ValueError, RecursionError):  # of too many digits, or nested too deeply
            options[name] = value
    return options
