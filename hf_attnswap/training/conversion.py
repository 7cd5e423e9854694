"""Run the stages of a recipe one after the other; a run that was cut off goes on where it stopped."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from ..errors import UsageError
from ..launch import build_accelerator, say
from ..sources.checksums import require_whole
from ..sources.conversions import RECIPE
from ..sources.files import holds_something, write_whole
from ..sources.lock import alone_in
from ..sources.models import architecture
from ..sources.structured import read_yaml
from . import stages
from .options import command, parse, words
from .recipe import StageOptions, keys_of
from .run import start


def convert(recipe: list[StageOptions], output_dir: Path) -> Path:
    """Run the stages of a recipe one after the other, and return the folder of the last model.

    `output_dir` gets `recipe.yaml`, the stages as they run, and a folder for each of the stages. Finished stages are
    not run again: a run that was cut off continues from the newest checkpoint of the stage in which the run stopped.

    Args:
        recipe: what `read_recipe` returns.

    Raises:
        UsageError: `output_dir` holds the run of another recipe, or other files; or a stage is refused. Where that is
            before anything was done, nothing is left.
    """
    accelerator = build_accelerator()
    with alone_in(output_dir) if accelerator.is_main_process else nullcontext():
        new = not (output_dir / RECIPE).exists()
        try:
            model = _convert(accelerator, recipe, output_dir)
        except UsageError:
            if new:
                _forget(accelerator, recipe, output_dir)
            raise
    accelerator.end_training()
    return model


def _convert(accelerator: Accelerator, recipe: list[StageOptions], output_dir: Path) -> Path:
    _keep(accelerator, recipe, output_dir / RECIPE)
    model = teacher = recipe[0][1]["model_name_or_path"]
    shape = architecture(model)
    for name, given in recipe:
        _stage(name, given, output_dir).require_fit(shape)  # now, and not when the stages before it have run
    original = True  # whether the model with softmax switched on is the teacher still
    for number, (name, given) in enumerate(recipe, start=1):
        folder = output_dir / f"{number}_{name}"
        given = {**given, "model_name_or_path": model}
        if given.get("attention"):
            teacher, original = model, True
        if "teacher_name_or_path" in keys_of(name) and not original:
            given.setdefault("teacher_name_or_path", teacher)
        stage = _stage(name, given, folder)
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


def _stage(name: str, given: dict[str, Any], folder: Path) -> stages.Stage:
    told = [*words(given), "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    return parse(stages.get(name), told)


def _keep(accelerator: Accelerator, recipe: list[StageOptions], path: Path) -> None:
    """Write the stages to `path`.

    Raises:
        UsageError: the folder holds a run of other stages, or other files.
    """
    given = [{"stage": name, **options} for name, options in recipe]
    accelerator.wait_for_everyone()
    if path.exists():
        before = _stages(path)
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
        write_whole(path, yaml.dump({"stages": given}, Dumper=_Dumper, sort_keys=False).encode())
    accelerator.wait_for_everyone()


def _forget(accelerator: Accelerator, recipe: list[StageOptions], output_dir: Path) -> None:
    """Take `recipe.yaml` away where no stage has begun, so that a recipe that was mended can have the folder."""
    folders = [output_dir / f"{number}_{name}" for number, (name, _) in enumerate(recipe, start=1)]
    if accelerator.is_main_process and not any(map(holds_something, folders)):
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        (output_dir / RECIPE).unlink(missing_ok=True)


class _Dumper(yaml.SafeDumper):
    """Writes what two stages have in common twice: aliases are not read."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _stages(path: Path) -> list[dict[str, object]]:
    """Return the stages that a run has left; UsageError where the file holds something else."""
    content = read_yaml(path)
    found = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(stage, dict) for stage in found):
        raise UsageError(f"{str(path)!r} is not what the run of a recipe writes: name another output_dir")
    return found
