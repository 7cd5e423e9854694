"""Which variant stands where in one part of a model, and how config.json says it.

A place is a layer, or one key/value group of a layer with the query heads that share its keys and values, "18.2": group
2 of layer 18. What no plan names keeps softmax.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from . import attentions
from .attentions.base import KINDS
from .errors import UsageError, shown

NAME = "attnswap"
FORMAT_VERSION = 3

# A variant and all its options.
Choice = tuple[str, dict[str, Any]]
# What runs in a layer: one variant, or by key/value group several, where groups that are absent keep softmax.
LayerPlan = Choice | dict[int, Choice]
Plan = dict[int, LayerPlan]


def choices(planned: LayerPlan) -> list[Choice]:
    """Return the variants of a layer, each once."""
    if not isinstance(planned, dict):
        return [planned]
    return [choice for at, choice in enumerate(planned.values()) if choice not in list(planned.values())[:at]]


def parse_place(place: Any, where: str) -> tuple[int, int]:
    """Return layer and group of a place such as "18.2"; a negative layer counts from the end.

    Args:
        where: what holds the place, for the error.

    Raises:
        UsageError: something else. A number is refused too, because 8.10 would be group 1.
    """
    if not isinstance(place, str) or not re.fullmatch(r"\s*-?\d{1,9}\.\d{1,9}\s*", place):
        hint = f": write it as text, '{place}'" if isinstance(place, float) else ""
        raise UsageError(f"{where} has {shown(place)}; expected layer.group, such as '18.2'{hint}")
    layer, _, group = place.strip().partition(".")
    return int(layer), int(group)


def layers_in(entry: Mapping[str, Any]) -> list[int]:
    """Return the layers that an entry of config.json names, as a whole or by their groups, in order."""
    parted = {int(place.partition(".")[0]) for place in entry.get("groups", ())}
    return sorted({*entry["layers"], *parted})


def plans_to_dict(plans: Mapping[str, Plan], kept: str) -> dict[str, Any]:
    """Return what goes into the config of one part of a model: a format version, and what is swapped there.

    That is an entry for each attention with the same options, with the layers where it stands in all groups and, where
    there are any, the groups of other layers; or None where nothing is swapped in this part.

    Args:
        plans: by kind of attention.
        kept: the attention implementation that the model had.
    """
    entries: list[dict[str, Any]] = []

    def entry_of(kind: str, choice: Choice) -> dict[str, Any]:
        name, options = choice
        for entry in entries:
            if (entry["kind"], entry["attention"], entry["options"]) == (kind, name, options):
                return entry
        entries.append({"attention": name, "options": dict(options), "kind": kind, "layers": []})
        return entries[-1]

    for kind, plan in plans.items():
        for layer, planned in sorted(plan.items()):
            if isinstance(planned, dict):
                for group, choice in sorted(planned.items()):
                    entry_of(kind, choice).setdefault("groups", []).append(f"{layer}.{group}")
            else:
                entry_of(kind, planned)["layers"].append(layer)
    return {"format_version": FORMAT_VERSION, "kept": kept, "swapped": entries or None}


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

    kept, entries = saved.get("kept"), saved.get("swapped")
    require(isinstance(kept, str), "kept", kept, "the name of an attention implementation")
    whole = "swapped" in saved and (entries is None or isinstance(entries, list) and len(entries) > 0)
    require(whole, "swapped", entries, "a list of groups of layers, or null where no layer is swapped")
    plans: dict[str, Plan] = {}
    for number, entry in enumerate(entries or ()):
        place = f"swapped[{number}]"
        require(isinstance(entry, Mapping), place, entry, "an object")
        name, given, kind, layers = (entry.get(key) for key in ("attention", "options", "kind", "layers"))
        groups = entry.get("groups", [])
        require(isinstance(name, str), f"{place}.attention", name, "the name of a variant")
        require(isinstance(given, Mapping), f"{place}.options", given, "an object")
        require(kind in KINDS, f"{place}.kind", kind, f"one of {', '.join(KINDS)}")
        require(isinstance(groups, list), f"{place}.groups", groups, "a list of places such as '18.2'")
        filled = isinstance(layers, list) and (len(layers) > 0 or len(groups) > 0)
        require(filled, f"{place}.layers", layers, "a list of indices")
        try:
            options = attentions.get(name).check_options(given)
        except ValueError as error:
            raise UsageError(f"{NAME} in {file} is damaged: {place}: {error}") from None
        plan = plans.setdefault(kind, {})
        for layer in layers:
            require(type(layer) is int and layer >= 0, f"an index in {place}.layers", layer, "a whole number")
            require(layer not in plan, f"{place}.layers", layers, f"no {kind} layer twice, as {layer} is")
            plan[layer] = (name, options)
        for layer, group in _read_places(groups, f"{NAME} in {file} is damaged: {place}.groups"):
            parted = plan.setdefault(layer, {})
            once = isinstance(parted, dict) and group not in parted
            require(once, f"{place}.groups", groups, f"no {kind} group twice, as {layer}.{group} is")
            parted[group] = (name, options)
    return plans


def _read_places(places: list[Any], where: str) -> Iterator[tuple[int, int]]:
    for given in places:
        layer, group = parse_place(given, where)
        if layer < 0:
            raise UsageError(f"{where} has {shown(given)}; expected a layer of at least 0")
        yield layer, group
