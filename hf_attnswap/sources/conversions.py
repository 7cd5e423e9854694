"""Conversions in folders: where the model lies, what is swapped in it, and how it was trained."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import NAME
from ..errors import UsageError
from ..plans import layers_in, plans_from_dict
from .checksums import require_whole
from .structured import read_object, read_yaml

# What the run of a recipe leaves, and in the folder of each stage its log and what it did.
RECIPE, LOG, RECORD, MODEL = "recipe.yaml", "training_log.jsonl", "stage.json", "model"
MODELS = ("model_name_or_path", "teacher_name_or_path")  # the stage before, in a folder of the run


@dataclass(frozen=True)
class Conversion:
    """Describe a model that was saved, converted or not.

    Attributes:
        name: of the folder that was named.
        folder: the model itself.
        swapped: the groups of layers that config.json holds; none where nothing is swapped.
        layers: those of all groups, as `SwapConfig` takes them; None for all of the model.
        training: one entry per stage, as `report` takes them: those of its recipe, or of stages that were run one by
            one; none where no record of a stage is there.
    """

    name: str
    folder: Path
    swapped: tuple[dict[str, Any], ...]
    layers: str | list[int] | None
    training: tuple[dict[str, Any], ...]


def find(path: str | Path) -> Conversion:
    """Return what lies in `path`: a folder that `save_pretrained` wrote, or the output folder of a stage or a recipe.

    Raises:
        UsageError: neither, a conversion that is not finished, a damaged config.json, or a model that has changed since
            the stage of a recipe wrote it.
    """
    path = Path(path)
    folder = model_folder(path)
    training = _training(folder.resolve())
    try:
        config = read_object(folder / "config.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{folder} has no config.json: name a saved model, or the output folder of a training recipe"
        ) from None
    require_whole(folder.resolve())
    saved = config.get(NAME)
    if saved is not None:
        plans_from_dict(saved, str(folder / "config.json"))  # says what is damaged
    swapped = tuple((saved or {}).get("swapped") or ())
    layers = sorted({layer for entry in swapped for layer in layers_in(entry)})
    whole = len(layers) in (0, config.get("num_hidden_layers"))
    named = Path(os.path.abspath(path))  # a link has a name of its own
    name = named.parent.name if training and named.name == MODEL else named.name
    return Conversion(name, folder, swapped, None if whole else _slice(layers), training)


def model_folder(path: str | Path) -> Path:
    """Return where the model lies in `path`, not looked at: `path`, or a folder in the run of a stage or a recipe.

    Raises:
        UsageError: a conversion that is not finished.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    if (path / RECIPE).is_file():
        return path / _stages(path)[-1] / MODEL
    return path / MODEL if (path / RECORD).is_file() else path


def _training(folder: Path) -> tuple[dict[str, Any], ...]:
    """Return what the stages did that made the model in `folder`, in order; none where no record is there."""
    stage, run = folder.parent, folder.parent.parent
    if folder.name != MODEL or not (stage / RECORD).is_file():
        return ()
    names = _stages(run) if (run / RECIPE).is_file() else []
    if stage.name in names:
        return tuple(_trained(run / name) for name in names[: names.index(stage.name) + 1])
    own = _trained(stage)
    before = Path(read_object(stage / RECORD)["options"].get(MODELS[0]) or "").resolve()
    return (*(() if before == folder else _training(before)), own)


def _slice(layers: list[int]) -> str | list[int]:
    """The same layers as a slice, where they are one."""
    step = layers[1] - layers[0] if len(layers) > 1 else 0
    if step and layers == list(range(layers[0], layers[-1] + 1, step)):
        return f"{layers[0]}:{layers[-1] + 1}" + (f":{step}" if step > 1 else "")
    return layers


def _stages(path: Path) -> list[str]:
    """Return the folder of every stage; UsageError where the run has not ended."""
    try:
        names = [given["stage"] for given in read_yaml(path / RECIPE)["stages"]]
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError("each of its stages needs a name")
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path / RECIPE} is not what the run of a recipe writes: {error}") from None
    stages = [f"{number}_{name}" for number, name in enumerate(names, start=1)]
    for name in stages:
        if not (path / name / MODEL).is_dir():
            raise UsageError(
                f"the conversion in {path} has not ended: {name} has no model; give the command of its recipe again"
            )
    return stages


def _trained(folder: Path) -> dict[str, Any]:
    """Return what a stage did, from its record and its log."""
    try:
        record = read_object(folder / RECORD)
        log = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
        given, first, last = record["options"], log[0], log[-1]
        return {
            "stage": record["stage"],
            "trains": record["trains"],
            "text": Path(given.get("train_file") or given["dataset_name"]).name,
            "tokens": last["tokens"],
            "steps": len(log),
            "learning_rate": max(entry["learning_rate"] for entry in log),
            "first_loss": first["loss"],
            "last_loss": last["loss"],
            "seconds": round(sum(entry["seconds"] for entry in log), 1),
            "arguments": {
                key: Path(value).name if key.endswith("_file") else value
                for key, value in given.items()
                if key not in MODELS
            },
        }
    except (OSError, LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{folder} holds no record of a stage, {RECORD} and {LOG}: {error!r}") from None
