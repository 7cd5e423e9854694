"""Recipes: YAML files that chain stages.

A recipe is a file, or the name of one of those in `recipes/`. Its keys are the options of the stages: those at the top
hold for every stage that knows them, those of a stage for it alone. `options` are those of the variant, and `share` of
a stage is its part of the `max_train_tokens` at the top. `builds_on` names a recipe whose keys hold where a recipe has
none of its own. A recipe without stages builds on that of the variant's family. Each stage begins with the model of the
one before it. After stages with `attention: softmax`, which train the original, a stage may name another attention:
what it swaps, and what teaches from there on, is the model as trained so far.

    attention: hedgehog+window
    options: {window: 64, sinks: 4}
    max_train_tokens: 1000000
    stages:
      - {stage: align, share: 0.2}
      - {stage: distill, share: 0.5, learning_rate: 1.0e-4}
      - {stage: finetune, share: 0.3, block_size: 1024}
"""

import dataclasses
import json
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from .. import attentions
from ..attentions.base import Attention, suggestion
from ..config import SwapConfig, parse_options
from ..errors import UsageError
from ..sources.structured import as_text, line_of, read_yaml, shown
from . import stages
from .options import Parser, add_options, options_of_plan, parse, words

# What a run of a recipe itself says to each stage.
SET_BY_THE_RUN = ("output_dir", "resume_from_checkpoint")
# Pairs of which one may be given: the one that is nearer to the stage, or on the command line, wins.
EITHER = (("train_file", "dataset_name"), ("max_train_steps", "max_train_tokens"))
ONLY_IN_RECIPES = {"stages", "builds_on", "options"}
OF_THE_SWAP = ("attention", "layers", "keep", "plan", "options")

StageOptions = tuple[str, dict[str, Any]]  # the name of a stage, and the options that are given to it


def names() -> dict[str, Path]:
    """Return the paths of the recipes of this package by their names."""
    folder = Path(str(files(__package__) / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def describe(name: str) -> str:
    """Return the first comment of a recipe of this package, which says what the recipe is for."""
    return names()[name].read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def read_recipe(recipe: str | Path, arguments: dict[str, Any] | None = None) -> list[StageOptions]:
    """Return the stages of a recipe, each with all options that are given to it.

    Args:
        recipe: a file, or the name of a recipe of this package.
        arguments: options by name, which replace those at the top of the recipe.

    Raises:
        UsageError: no such recipe, or one with an unknown or unfit key or value; the message names file, line and key.
    """
    read = _Recipe(_files(str(recipe)), arguments or {})
    plan = read.content().get("plan")
    if isinstance(plan, str):
        told = options_of_arguments(options_of_plan(plan))
        said = {key: value for key, value in told.items() if value is not None}
        read = _Recipe(read.files, read.arguments | said)
    for key in ("model_name_or_path", "attention"):
        if read.content().get(key) is None:
            raise UsageError(f"{read.place()} has no {key}: give --{key}")
    if "stages" not in read.content():
        family = _variant(read.place(("attention",)), read.content()["attention"]).family
        read = _Recipe([*read.files, *_files(family)], read.arguments)
    content = read.content()
    given = content.pop("stages")
    known = {name: keys_of(name) for name in stages.available()}
    for key in content:
        _check_key(read.place((key,)), key, ONLY_IN_RECIPES.union(*known.values()))
    if not isinstance(given, list) or not given or not all(isinstance(stage, dict) for stage in given):
        raise UsageError(
            f"{read.place(('stages',))}: stages is {shown(given)}; expected a list such as [{{stage: align}}]"
        )
    result: list[StageOptions] = []
    swapped = "softmax"
    for index, stage in enumerate(given):
        name = stage.get("stage")
        place = f"stage {index + 1} of {read.place(('stages', index))}"
        if not isinstance(name, str) or name not in known:
            raise UsageError(
                f"{place}: stage is {shown(name)}.{suggestion(str(name), known)} Stages: {', '.join(known)}"
            )
        options = {key: value for key, value in stage.items() if key != "stage"}

        def where(key: str, index: int = index, name: str = name) -> str:
            return f"stage {index + 1} ({name}) of {read.place(('stages', index, key), (key,), ('stages', index))}"

        for key in options:
            _check_key(where(key), key, known[name] | {"share"})
        if "share" in options:
            options["max_train_tokens"] = _share(where("share"), options.pop("share"), content.get("max_train_tokens"))
        # The model of a later stage comes swapped.
        shared = {k: v for k, v in content.items() if index == 0 or k not in OF_THE_SWAP}
        options = {key: value for key, value in _with(shared, options).items() if key in known[name]}
        _check_values(where, name, options)
        attention = options.get("attention")
        if attention and swapped != "softmax":
            raise UsageError(
                f"{where('attention')}: swaps to {attention!r} what is {swapped!r} already: name one attention, after "
                "stages with softmax if any"
            )
        swapped = attention or swapped
        result.append((name, options))
    return result


@dataclass(frozen=True)
class _File:
    """A file of a recipe: what the user calls it, where it lies, its keys, and where in it they stand."""

    called: str
    path: Path
    content: dict[str, Any]
    node: yaml.Node

    def place(self, *keys: str | int) -> str | None:
        """Return in words where something stands; None where it is not in this file."""
        line = line_of(self.node, *keys)
        return None if line is None else f"recipe {self.called!r}, line {line}"


@dataclass(frozen=True)
class _Recipe:
    """The file of a recipe and those that it builds on, and arguments, which win over them."""

    files: list[_File]
    arguments: dict[str, Any]

    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for file in reversed(self.files):
            content = _with(content, file.content)
        return _with(content, self.arguments)

    def place(self, *paths: tuple[str | int, ...]) -> str:
        """Return in words where the first of these paths of keys stands that is there; else the recipe as a whole."""
        for keys in paths:
            if keys[0] in self.arguments:
                return "the command line"
            for found in (file.place(*keys) for file in self.files):
                if found is not None:
                    return found
        return f"recipe {self.files[0].called!r}"


def _files(called: str) -> list[_File]:
    """Return the file of a recipe, and those that it builds on, which lie beside it or in this package."""
    found: list[_File] = []
    folder = Path()
    while True:
        path = names().get(called) or folder / called
        try:
            content = read_yaml(path)
            if any(path.samefile(file.path) for file in found):
                raise UsageError(f"recipe {found[0].called!r} builds on itself, by way of {found[-1].called!r}")
        except OSError:
            raise UsageError(
                f"recipe {called!r} is neither a file nor one of {', '.join(names())}.{suggestion(called, names())}"
            ) from None
        if not isinstance(content, dict):
            raise UsageError(f"recipe {called!r} holds {shown(content)}; expected keys such as attention and stages")
        base = content.pop("builds_on", None)
        found.append(_File(called, path, content, yaml.compose(path.read_bytes(), yaml.SafeLoader)))
        if base is None:
            return found
        if not isinstance(base, str) or not _plain(base):
            place = found[-1].place("builds_on")
            raise UsageError(f"{place}: builds_on is {shown(base)}; expected the name of a recipe")
        called, folder = base, path.parent


def _with(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of both dicts, where those above win; options of the variant are merged one by one."""
    hidden = {other for pair in EITHER for other in pair if set(pair) & above.keys()}
    merged = {key: value for key, value in below.items() if key not in hidden} | above
    if isinstance(below.get("options"), dict) and isinstance(above.get("options"), dict):
        merged["options"] = {**below["options"], **above["options"]}
    return merged


def _variant(place: str, attention: Any) -> type[Attention]:
    try:
        return attentions.get(as_text(attention))
    except ValueError as error:
        raise UsageError(f"{place}: {error}") from None


def _share(place: str, share: Any, tokens: Any) -> int:
    if type(tokens) is not int or not 0 < tokens < 2**63:
        raise UsageError(
            f"{place}: takes a share of max_train_tokens, which is {shown(tokens)}: give --max_train_tokens"
        )
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise UsageError(f"{place}: share is {shown(share)}; expected a part of 1, for example 0.25")
    return max(1, int(tokens * share))


def keys_of(stage: str) -> set[str]:
    """Return the keys that a stage takes in a recipe, `share` apart."""
    fields = {field.name for field in dataclasses.fields(stages.get(stage))}
    return fields - {*SET_BY_THE_RUN, "option"} | {"options"}


def _check_key(place: str, key: Any, known: set[str]) -> None:
    if key not in known:
        raise UsageError(
            f"{place}: unknown key {shown(key)}.{suggestion(str(key), known)} Known: {', '.join(sorted(known))}"
        )


def _check_values(where: Callable[[str], str], stage: str, given: dict[str, Any]) -> None:
    """Check the options of a stage one by one, and then together."""
    kinds, reader = get_type_hints(stages.get(stage)), Parser(prog=stage)
    add_options(reader, stages.get(stage), optional=True)
    for key, value in given.items():
        if value is None:  # as if it were not given
            continue
        if key == "options":
            _check_options(where(key), given.get("attention"), value)
            continue
        if key in ("layers", "text_lengths") and isinstance(value, list) and all(type(n) is int for n in value):
            continue
        if key == "layers" and isinstance(value, dict) or key == "keep" and isinstance(value, list):
            _check_places(where(key), key, value)
            continue
        if not _plain(value) or isinstance(value, bool) != (kinds[key] is bool):
            expected = "true or false" if kinds[key] is bool else "a text or a number"
            raise UsageError(f"{where(key)}: {key} is {shown(value)}; expected {expected}")
        if key == "attention":
            _variant(where(key), value)
        try:
            reader.parse_args(words({key: value}))
        except UsageError as error:
            raise UsageError(f"{where(key)}: {error}") from None
    try:
        parse(stages.get(stage), [*words(given), "--output_dir", "."])
    except UsageError as error:
        raise UsageError(f"{where('stage')}: {error}") from None


def _check_places(place: str, key: str, value: Any) -> None:
    try:
        SwapConfig(**{key: value})
        json.dumps(value)
    except (UsageError, TypeError, ValueError) as error:
        raise UsageError(f"{place}: {error}") from None


def _check_options(place: str, attention: Any, options: Any) -> None:
    named = isinstance(options, dict) and all(isinstance(key, str) and _plain(key) for key in options)
    if not named or not all(_plain(value) for value in options.values()):
        raise UsageError(f"{place}: options is {shown(options)}; expected names with values, such as {{window: 64}}")
    if attention is not None:
        try:
            _variant(place, attention).check_options(options)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"{place}: {error}") from None


def _plain(value: Any) -> bool:
    """Whether a value can stand on a command line: a text, a finite number, or true or false."""
    if isinstance(value, str):
        return all(unicodedata.category(letter) not in ("Cc", "Cs") for letter in value)  # no controls, no surrogates
    return isinstance(value, int) or isinstance(value, float) and math.isfinite(value)


def options_of_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of the command line as keys of a recipe."""
    given = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    option = given.pop("option", None)
    return given | ({"options": parse_options(option)} if option else {})
