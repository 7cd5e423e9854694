"""Recipes: YAML files that chain stages, and runs of them that go on where they were cut off.

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
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from .. import attentions
from ..attentions.base import suggestion
from ..config import parse_options
from ..errors import UsageError
from ..launch import build_accelerator, say
from ..sources.checksums import require_whole
from ..sources.files import holds_something, write_whole
from ..sources.lock import alone_in
from . import stages
from .options import command, parse, words
from .run import start

# What a run of a recipe itself says to each stage.
SET_BY_THE_RUN = ("output_dir", "resume_from_checkpoint")
# Pairs of which one may be given: the one that is nearer to the stage, or on the command line, wins.
EITHER = (("train_file", "dataset_name"), ("max_train_steps", "max_train_tokens"))
ONLY_IN_RECIPES = {"stages", "builds_on", "options"}

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
        UsageError: no such recipe, or one with an unknown or unfit key or value.
    """
    content = _with(_content(recipe), arguments or {})
    where = f"recipe {str(recipe)!r}"
    for key in ("model_name_or_path", "attention"):
        if key not in content:
            raise UsageError(f"{where} has no {key}: give --{key}")
    if "stages" not in content:
        content = _with(_content(_family(content["attention"])), content)
    given = content.pop("stages")
    known = {name: _keys(name) for name in stages.available()}
    _check_keys(where, content, ONLY_IN_RECIPES.union(*known.values()))
    if not isinstance(given, list) or not given or not all(isinstance(stage, dict) for stage in given):
        raise UsageError(f"stages in {where} is {given!r}; expected a list such as [{{stage: align}}]")
    result: list[StageOptions] = []
    swapped = "softmax"
    for number, stage in enumerate(given, start=1):
        name = stage.get("stage")
        if name not in known:
            raise UsageError(
                f"stage {number} of {where} is {name!r}.{suggestion(str(name), known)} Stages: {', '.join(known)}"
            )
        place = f"stage {number} ({name}) of {where}"
        options = {key: value for key, value in stage.items() if key != "stage"}
        _check_keys(place, options, known[name] | {"share"})
        if "share" in options:
            options["max_train_tokens"] = _share(place, options.pop("share"), content.get("max_train_tokens"))
        # The model of a later stage comes swapped.
        shared = {k: v for k, v in content.items() if number == 1 or k not in ("attention", "layers", "options")}
        options = {key: value for key, value in _with(shared, options).items() if key in known[name]}
        try:
            _parsed(name, options, Path("."))
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from None
        attention = options.get("attention")
        if attention and swapped != "softmax":
            raise UsageError(
                f"{place} swaps to {attention!r} what is {swapped!r} already: name one attention, after stages with "
                "softmax if any"
            )
        swapped = attention or swapped
        result.append((name, options))
    return result


def convert(recipe: list[StageOptions], output_dir: Path) -> Path:
    """Run the stages of a recipe one after the other, and return the folder of the last model.

    `output_dir` gets `recipe.yaml`, the stages as they run, and a folder for each of the stages. Finished stages are
    not run again: a run that was cut off continues from the newest checkpoint of the stage in which the run stopped.

    Args:
        recipe: what `read_recipe` returns.

    Raises:
        UsageError: `output_dir` holds the run of another recipe, or other files.
    """
    accelerator = build_accelerator()
    with alone_in(output_dir) if accelerator.is_main_process else nullcontext():
        model = _convert(accelerator, recipe, output_dir)
    accelerator.end_training()
    return model


def _convert(accelerator: Accelerator, recipe: list[StageOptions], output_dir: Path) -> Path:
    _keep(accelerator, recipe, output_dir / "recipe.yaml")
    model = teacher = recipe[0][1]["model_name_or_path"]
    original = True  # whether the model with softmax switched on is the teacher still
    for number, (name, given) in enumerate(recipe, start=1):
        folder = output_dir / f"{number}_{name}"
        given = {**given, "model_name_or_path": model}
        if given.get("attention"):
            teacher, original = model, True
        if "teacher_name_or_path" in _keys(name) and not original:
            given.setdefault("teacher_name_or_path", teacher)
        stage = _parsed(name, given, folder, "--resume_from_checkpoint", "latest")
        original = original and not stage.moves_the_original()
        model = str(folder / "model")
        if Path(model).exists():
            require_whole(model)
            say(accelerator, f"{folder.name} is done")
            continue
        say(accelerator, f"{folder.name}: {command(name, {**given, 'output_dir': folder})}")
        with start(stage) as own:
            stage.run(own)
        own.free_memory()
    return Path(model)


def _content(recipe: str | Path, folder: Path = Path(".")) -> dict[str, Any]:
    """Return the keys of a recipe, with those of the recipe that it builds on.

    A recipe that is built on lies beside the other recipe or in this package.
    """
    path = names().get(str(recipe)) or folder / recipe
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(
            f"recipe {str(recipe)!r} is neither a file nor one of {', '.join(names())}."
            f"{suggestion(str(recipe), names())}"
        ) from None
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {str(recipe)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"recipe {str(recipe)!r} holds {content!r}; expected keys such as attention and stages")
    base = content.pop("builds_on", None)
    return content if base is None else _with(_content(base, path.parent), content)


def _with(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of both dicts, where those above win; options of the variant are merged one by one."""
    hidden = {other for pair in EITHER for other in pair if set(pair) & above.keys()}
    merged = {key: value for key, value in below.items() if key not in hidden} | above
    if below.get("options") and above.get("options"):
        merged["options"] = {**below["options"], **above["options"]}
    return merged


def _family(attention: str) -> str:
    try:
        return attentions.get(attention).family
    except ValueError as error:
        raise UsageError(str(error)) from None


def _share(place: str, share: Any, tokens: Any) -> int:
    if type(tokens) is not int:
        raise UsageError(f"{place} takes a share of max_train_tokens, which is {tokens!r}: give --max_train_tokens")
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise UsageError(f"{place} has share {share!r}; expected a part of 1, for example 0.25")
    return max(1, int(tokens * share))


def _keys(stage: str) -> set[str]:
    fields = {field.name for field in dataclasses.fields(stages.get(stage))}
    return fields - {*SET_BY_THE_RUN, "option"} | {"options"}


def _check_keys(where: str, given: dict[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            raise UsageError(
                f"{where} has an unknown key {key!r}.{suggestion(key, known)} Known: {', '.join(sorted(known))}"
            )


def _parsed(name: str, given: dict[str, Any], folder: Path, *more: str) -> stages.Stage:
    return parse(stages.get(name), [*words(given), "--output_dir", str(folder), *more])


def _keep(accelerator: Accelerator, recipe: list[StageOptions], path: Path) -> None:
    """Write the stages to `path`.

    Raises:
        UsageError: the folder holds a run of other stages, or other files.
    """
    given = [{"stage": name, **options} for name, options in recipe]
    accelerator.wait_for_everyone()
    if path.exists():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
        for number, (now, was) in enumerate(zip(given, before, strict=False), start=1):
            for key in [*now, *was]:
                if now.get(key) != was.get(key):
                    raise UsageError(
                        f"{str(path.parent)!r} holds a run whose stage {number} has {key} = {was.get(key)!r}, not "
                        f"{now.get(key)!r}: give the same recipe, or another output_dir"
                    )
        if len(before) != len(given):
            raise UsageError(
                f"{str(path.parent)!r} holds a run of {len(before)} stages, not {len(given)}: give the same recipe, "
                "or another output_dir"
            )
    elif holds_something(path.parent):
        raise UsageError(f"output folder {str(path.parent)!r} is not empty, and holds no run of a recipe")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, yaml.safe_dump({"stages": given}, sort_keys=False).encode())
    accelerator.wait_for_everyone()


def options_of_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of the command line as keys of a recipe."""
    given = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    option = given.pop("option", None)
    return given | ({"options": parse_options(option)} if option else {})
