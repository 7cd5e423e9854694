"""Which attention goes where: what the user says, what is saved in config.json."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import attentions
from .attentions.base import KINDS
from .errors import UsageError, shown

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
            raise UsageError(f"option {min(unused, key=str)!r} belongs to none of the attentions in layers")
        return plan

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


def plans_from_dict(saved: Any, file: str = "config.json") -> dict[str, Plan]:
    """Read what config.json says, and return the plans by kind of attention.

    Args:
        file: the path of config.json, for errors.

    Raises:
        UsageError: a newer format, or something that this package did not write, with its place and value.
    """
    version = saved.get("format_version") if isinstance(saved, Mapping) else None
    if type(version) is not int or version != FORMAT_VERSION:
        advice = ""
        if type(version) is int:
            newer = version > FORMAT_VERSION
            advice = ": upgrade hf_attnswap" if newer else ": an older hf_attnswap wrote it; convert the model again"
        raise UsageError(f"{NAME} in {file} has format_version {shown(version)}; expected {FORMAT_VERSION}{advice}")

    def require(holds: bool, place: str, value: Any, expected: str) -> None:
        if not holds:
            raise UsageError(f"{NAME} in {file} is damaged: {place} is {shown(value)}; expected {expected}")

    kept, groups = saved.get("kept"), saved.get("swapped")
    require(isinstance(kept, str), "kept", kept, "the name of an attention implementation")
    whole = "swapped" in saved and (groups is None or isinstance(groups, list) and len(groups) > 0)
    require(whole, "swapped", groups, "a list of groups of layers, or null where no layer is swapped")
    plans: dict[str, Plan] = {}
    for number, group in enumerate(groups or ()):
        place = f"swapped[{number}]"
        require(isinstance(group, Mapping), place, group, "an object")
        name, given, kind, layers = (group.get(key) for key in ("attention", "options", "kind", "layers"))
        require(isinstance(name, str), f"{place}.attention", name, "the name of a variant")
        require(isinstance(given, Mapping), f"{place}.options", given, "an object")
        require(kind in KINDS, f"{place}.kind", kind, f"one of {', '.join(KINDS)}")
        require(isinstance(layers, list) and len(layers) > 0, f"{place}.layers", layers, "a list of indices")
        try:
            options = attentions.get(name).check_options(given)
        except ValueError as error:
            raise UsageError(f"{NAME} in {file} is damaged: {place}: {error}") from None
        plan = plans.setdefault(kind, {})
        for index in layers:
            require(type(index) is int and index >= 0, f"an index in {place}.layers", index, "a whole number")
            require(index not in plan, f"{place}.layers", layers, f"no {kind} layer twice, as {index} is")
            plan[index] = (name, options)
    return plans


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
