"""Which attention goes where: what the user says, what is saved in config.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import attentions
from .attentions.base import KINDS
from .errors import UsageError

NAME = "attnswap"
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

FORMAT_VERSION = 3

# For each layer index: a variant and all its options.
Plan = dict[int, tuple[str, dict[str, Any]]]


@dataclass
class SwapConfig:
    """Describe a swap, as the user does.

    Attributes:
        attention: name of a variant, see `hf_attnswap.available()`.
        layers: None for all layers; a list of indices; a slice string such as "1::2"; or a dict from an index or slice
            string to an attention name or to `{"attention": name, option: value, ...}`, which leaves all other layers
            as they are.
        options: options of the variant; those that a dict in `layers` gives win.
        kinds: which attention of these layers: "causal" (a text to its own past), "bidirectional" (to itself), "cross"
            (to another, as decoders to their encoder).
    """

    attention: str = "hedgehog+window"
    layers: None | Sequence[int] | str | Mapping[int | str, Any] = None
    options: dict[str, Any] = field(default_factory=dict)
    kinds: Sequence[str] = ("causal", "bidirectional")

    def __post_init__(self):
        if isinstance(self.kinds, str):
            self.kinds = (self.kinds,)
        for kind in self.kinds:
            if kind not in KINDS:
                raise UsageError(f"kinds has {kind!r}; expected some of {', '.join(KINDS)}")
        if not self.kinds:
            raise UsageError("kinds is empty; leave it out to swap all self-attention")

    def plan(self, indices: Sequence[int]) -> Plan:
        """Return for each of these layers that is to be swapped the variant and all its options with their values.

        Raises:
            UsageError: an unknown variant, option or layer, or a layer named twice.
        """
        if isinstance(self.layers, Mapping):
            if not self.layers:
                raise UsageError("layers is empty; leave it out to swap all layers")
            choices: list[tuple[Any, str, dict[str, Any]]] = [
                (layers, *self._choice(given)) for layers, given in self.layers.items()
            ]
        else:
            choices = [(self.layers, self.attention, self.options)]
        plan: Plan = {}
        used: set[str] = set()
        for layers, name, given in choices:
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
            for index in select(layers, indices):
                if index in plan:
                    raise UsageError(f"layers names layer {index} twice")
                plan[index] = (name, options)
        unused = set(self.options) - used
        if unused:
            raise UsageError(f"option {sorted(unused)[0]!r} belongs to none of the attentions in layers")
        return plan

    def _choice(self, given: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if isinstance(given, str):
            return given, self.options
        if not isinstance(given, Mapping):
            raise UsageError(
                f"layers gives {given!r} for a layer; expected a name or a dict with attention and options"
            )
        own = {n: v for n, v in given.items() if n != "attention"}
        name = given.get("attention", self.attention)
        unknown = set(own) - set(_get(name).options())
        if unknown:
            raise UsageError(f"{name} has no option {sorted(unknown)[0]!r}")
        return name, {**self.options, **own}


def plans_to_dict(plans: Mapping[str, Plan], kept: str) -> dict[str, Any]:
    """Return what goes into the config of one part of a model: a format version, and what is swapped there.

    That is groups of layers with the same attention and options, or None where nothing is swapped in this part.

    Args:
        plans: by kind of attention.
        kept: the attention implementation that the model had.
    """
    groups: list[dict[str, Any]] = []
    for kind, plan in plans.items():
        for index, (name, options) in sorted(plan.items()):
            for group in groups:
                if (group["kind"], group["attention"], group["options"]) == (kind, name, options):
                    group["layers"].append(index)
                    break
            else:
                groups.append({"attention": name, "options": dict(options), "kind": kind, "layers": [index]})
    return {"format_version": FORMAT_VERSION, "kept": kept, "swapped": groups or None}


def plans_from_dict(saved: Any) -> dict[str, Plan]:
    """Read what config.json says, and return the plans by kind of attention.

    Raises:
        UsageError: a newer format, or something that this package did not write.
    """
    version = saved.get("format_version") if isinstance(saved, Mapping) else None
    if type(version) is not int or version != FORMAT_VERSION:
        advice = ""
        if type(version) is int:
            newer = version > FORMAT_VERSION
            advice = ": upgrade hf_attnswap" if newer else ": an older hf_attnswap wrote it; convert the model again"
        raise UsageError(f"attnswap in config.json has format_version {version!r}; expected {FORMAT_VERSION}{advice}")
    plans: dict[str, Plan] = {}
    try:
        if not isinstance(saved["kept"], str):
            raise ValueError(f"kept is {saved['kept']!r}")
        if saved["swapped"] == []:
            raise ValueError("no layer is swapped")
        for group in saved["swapped"] or ():
            kind = group["kind"]
            if kind not in KINDS:
                raise ValueError(f"kind is {kind!r}")
            cls = _get(group["attention"])
            options = cls.check_options(group["options"])
            for index in group["layers"]:
                if type(index) is not int:
                    raise ValueError(f"layer is {index!r}")
                if index in plans.setdefault(kind, {}):
                    raise ValueError(f"{kind} layer {index} is there twice")
                plans[kind][index] = (group["attention"], options)
    except UsageError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"attnswap in config.json is damaged: {error} in {saved!r}") from None
    return plans


def known_architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the names of classes of transformers that a config.json holds, as they are without `ARCHITECTURE`."""
    names = config.get("architectures") or []
    return [str(name).removeprefix(ARCHITECTURE) if NAME in config else name for name in names]


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
            raise UsageError(f"layers is {layers!r}; expected a slice such as '1::2'") from None
        if not chosen:
            raise UsageError(f"layers {layers!r} selects none of the {len(indices)} layers")
        return chosen
    chosen = []
    for layer in [layers] if isinstance(layers, int | str) else layers:
        try:
            if isinstance(layer, bool | float):
                raise TypeError
            index = int(layer)
        except (TypeError, ValueError):
            raise UsageError(f"layers has {layer!r}; expected an index or a slice such as '1::2'") from None
        index = index + len(indices) if index < 0 else index
        if index not in indices:
            raise UsageError(f"layers has {layer}, but the model's attention layers are {_span(indices)}")
        chosen.append(index)
    if not chosen:
        raise UsageError("layers is empty; leave it out to swap all layers")
    return chosen


def _span(indices: list[int]) -> str:
    contiguous = indices == list(range(indices[0], indices[-1] + 1))
    return f"{indices[0]} to {indices[-1]}" if contiguous else ", ".join(map(str, indices))


def _get(name: str) -> type[attentions.Attention]:
    try:
        return attentions.get(name)
    except ValueError as error:
        raise UsageError(str(error)) from None


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
            raise UsageError(f"option {assignment!r} has no value; expected name=value")
        try:
            options[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            options[name] = value
    return options
