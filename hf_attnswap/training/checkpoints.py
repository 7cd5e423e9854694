"""Write checkpoints that are whole or not there, and find the one from which a run goes on."""

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import UsageError
from ..sources.checksums import CHECKSUMS, checksums, damage
from .state import RunState

logger = logging.getLogger(__name__)

RUN = "run.json"


@dataclass(frozen=True)
class Checkpoint:
    """Describe a checkpoint that is whole.

    Attributes:
        folder: where it lies.
        settings: those of its run, as JSON values.
        losses: of all steps so far.
    """

    folder: Path
    settings: dict[str, Any]
    losses: list[float]


def save_checkpoint(state: RunState, output_dir: Path, run: dict[str, Any]) -> Path:
    """Write `output_dir/checkpoints/step_N` and return its path.

    N is the number of losses in `run`. The checkpoint appears whole by rename. The one before stays, so that damage to
    the newest costs the steps between them and not the run; others are removed, and nothing but checkpoints is.

    Args:
        run: the settings, and the losses of all steps so far, as JSON values.

    Raises:
        OSError: the checkpoint could not be written, as on a full disk; the checkpoints before stay.
    """
    step = len(run["losses"])
    folder = output_dir / "checkpoints"
    final, partial = folder / f"step_{step}", folder / f"partial_{step}"
    try:
        _write(state, partial, run)
        if state.accelerator.is_main_process:
            if step in _steps(folder):
                _remove(final)
            os.replace(partial, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        before = max(_steps(folder), default=None)
        kept = f"{str(folder / f'step_{before}')!r} stays, from which" if before else "there is none before it, so"
        there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        raise OSError(
            f"checkpoint {str(final)!r} could not be written ({str(error).splitlines()[0]}), with "
            f"{shutil.disk_usage(there).free >> 20} MiB free there: {kept} the run goes on with "
            "--resume_from_checkpoint latest once there is room"
        ) from error
    if state.accelerator.is_main_process:
        _remove_others(folder, step)
    state.accelerator.wait_for_everyone()
    return final


def _write(state: RunState, partial: Path, run: dict[str, Any]) -> None:
    if state.accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    state.accelerator.wait_for_everyone()
    state.save(partial)
    state.accelerator.wait_for_everyone()
    if state.accelerator.is_main_process:
        (partial / RUN).write_text(json.dumps(run))
        (partial / CHECKSUMS).write_text(json.dumps(checksums(partial), indent=1))
        for path in partial.rglob("*"):
            _flush(path)


def _remove_others(folder: Path, step: int) -> None:
    """Remove what is older than the checkpoint before `step`, and what a run that went back has passed over."""
    steps = _steps(folder)
    before = max((at for at in steps if at < step), default=None)
    for at in steps:
        if at not in (step, before):
            _remove(folder / f"step_{at}")
    for path in folder.iterdir():
        if re.fullmatch(r"partial_(step_)?\d+", path.name) and path.is_dir():  # a run was cut off in it
            shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(asked: str | Path, output_dir: Path | None) -> Checkpoint | None:
    """Return the checkpoint to resume from; None where "latest" is asked for and there is none.

    With "latest", the newest checkpoint of `output_dir` that is whole is taken, and damaged ones are skipped with a
    warning. The checksums of all files are compared.

    Args:
        asked: the folder of a checkpoint, or "latest".
        output_dir: the output folder of the run.

    Raises:
        UsageError: `asked` is a folder that is not a whole checkpoint.
    """
    if asked != "latest":
        try:
            return _read(Path(asked))
        except _Damage as damaged:
            raise UsageError(
                f"resume_from_checkpoint {str(asked)!r} is not a checkpoint of this package: {damaged}"
            ) from None
    folder = (output_dir or Path()) / "checkpoints"
    for step in sorted(_steps(folder) if output_dir else (), reverse=True):
        try:
            return _read(folder / f"step_{step}")
        except _Damage as damaged:
            logger.warning("checkpoint %r is passed over: %s", str(folder / f"step_{step}"), damaged)
    return None


class _Damage(Exception):
    """Say what is wrong with a checkpoint."""


def _read(folder: Path) -> Checkpoint:
    """Return the checkpoint in a folder; _Damage where it is not whole."""
    expected = _json(folder / CHECKSUMS, {RUN: str})
    found = damage(folder, expected)
    if found is not None:
        raise _Damage(found)
    run = _json(folder / RUN, {"settings": dict, "losses": list})
    return Checkpoint(folder, run["settings"], run["losses"])


def _json(path: Path, entries: dict[str, type]) -> dict[str, Any]:
    """Return the object that a file holds, which has at least these entries."""
    try:
        content = json.loads(path.read_text())
        missing = [key for key, kind in entries.items() if not isinstance(content[key], kind)]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _Damage(f"its {path.name} cannot be read ({type(error).__name__})") from None
    if missing:
        raise _Damage(f"its {path.name} has no sound {missing[0]!r}")
    return content


def resume(state: RunState, checkpoint: Checkpoint, settings: dict[str, Any]) -> list[float]:
    """Load a checkpoint into a run, and return the losses so far.

    Raises:
        UsageError: the checkpoint is of a run with other settings, or of other parameters than this run trains.
    """
    wanted, found = json.loads(json.dumps(settings)), checkpoint.settings
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UsageError(
                f"checkpoint {str(checkpoint.folder)!r} is of a run with {name} = {found.get(name)!r}, not "
                f"{wanted.get(name)!r}: give the same arguments as that run, or start anew in another folder"
            )
    state.load(checkpoint.folder)
    return list(checkpoint.losses)


def _steps(folder: Path) -> list[int]:
    """Return the steps of which `folder` has a checkpoint, whole or damaged; what else lies there is not ours."""
    if not folder.is_dir():
        return []
    folders = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    found = (re.fullmatch(r"step_([1-9]\d*)", path.name) for path in folders)
    return [int(match[1]) for match in found if match]


def _flush(path: Path) -> None:
    """Flush a file to the disk, so that a rename cannot become visible before the content that the rename names."""
    if path.is_file():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that one that is half removed does not look whole."""
    doomed = folder.with_name(f"partial_{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
