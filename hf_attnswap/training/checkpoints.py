"""Write checkpoints that are whole or not there, and resume a run from one."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UsageError

logger = logging.getLogger(__name__)


def save_checkpoint(accelerator: Accelerator, output_dir: Path, run: dict[str, Any]) -> Path:
    """Write `output_dir/checkpoints/step_N` and return its path; older checkpoints are removed afterwards.

    N is the number of losses in `run`. The checkpoint appears whole by rename.

    Args:
        run: the settings, and the losses of all steps so far, as JSON values.

    Raises:
        OSError: the checkpoint could not be written, as on a full disk; the checkpoint before stays.
    """
    step = len(run["losses"])
    folder = output_dir / "checkpoints"
    final, partial = folder / f"step_{step}", folder / f"partial_{step}"
    try:
        _write(accelerator, partial, run)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        before = max(folder.glob("step_*"), key=_step, default=None)
        kept = f"{str(before)!r} stays, from which" if before else "there is none before it, so"
        raise OSError(
            f"checkpoint {str(final)!r} could not be written ({str(error).splitlines()[0]}), with "
            f"{shutil.disk_usage(folder).free >> 20} MiB free there: {kept} the run goes on with "
            "--resume_from_checkpoint latest once there is room"
        ) from error
    if accelerator.is_main_process:
        if final.exists():
            _remove(final)
        os.replace(partial, final)
        for other in list(folder.iterdir()):
            if other != final:
                _remove(other)
    accelerator.wait_for_everyone()
    return final


def _write(accelerator: Accelerator, partial: Path, run: dict[str, Any]) -> None:
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {str(p.relative_to(partial)): p.stat().st_size for p in partial.rglob("*") if p.is_file()}
        (partial / "run.json").write_text(json.dumps({**run, "files": files}))
        for path in partial.rglob("*"):
            _flush(path)


def find_checkpoint(asked: str | Path, output_dir: Path | None) -> Path | None:
    """Return the checkpoint to resume from; None where "latest" is asked for and there is none.

    With "latest", the newest checkpoint of `output_dir` that is whole is taken, and damaged ones are skipped with a
    warning.

    Args:
        asked: the folder of a checkpoint, or "latest".
        output_dir: the output folder of the run.

    Raises:
        UsageError: `asked` is a folder that is not a whole checkpoint.
    """
    if asked == "latest":
        found = (output_dir / "checkpoints").glob("step_*") if output_dir is not None else ()
        for path in sorted(found, key=_step, reverse=True):
            damage = _damage(path)
            if damage is None:
                return path
            logger.warning("checkpoint %r is passed over: %s", str(path), damage)
        return None
    damage = _damage(Path(asked))
    if damage is not None:
        raise UsageError(f"resume_from_checkpoint {str(asked)!r} is not a checkpoint of this package: {damage}")
    return Path(asked)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; None where the checkpoint is whole."""
    try:
        files = json.loads((folder / "run.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its run.json cannot be read ({type(error).__name__})"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def resume(accelerator: Accelerator, checkpoint: Path, settings: dict[str, Any]) -> list[float]:
    """Load a checkpoint into what `accelerator` has prepared, and return the losses so far.

    Raises:
        UsageError: the checkpoint is of a run with other settings, or of other parameters than this run trains.
    """
    run = json.loads((checkpoint / "run.json").read_text())
    wanted, found = json.loads(json.dumps(settings)), run["settings"]
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UsageError(
                f"checkpoint {str(checkpoint)!r} is of a run with {name} = {found.get(name)!r}, not "
                f"{wanted.get(name)!r}: give the same arguments as that run, or start anew in another folder"
            )
    accelerator.load_state(str(checkpoint))
    return run["losses"]


def checkpoint_what_trains(accelerator: Accelerator) -> None:
    """Leave the frozen weights out of checkpoints, under names that do not depend on the number of processes.

    FSDP and DeepSpeed write the model themselves and pass nothing to the hooks that this function registers.
    """

    def trainable(model: nn.Module) -> dict[str, Tensor]:
        plain = accelerator.unwrap_model(model, keep_torch_compile=False)
        return {n: p.detach() for n, p in plain.named_parameters() if p.requires_grad}

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        if weights and accelerator.is_main_process:
            tensors = {name: tensor.contiguous() for name, tensor in trainable(models[0]).items()}
            save_file(tensors, Path(folder) / "trainable.safetensors")
        weights.clear()

    def load(models: list[nn.Module], folder: str) -> None:
        if not models:
            return
        own, saved = trainable(models.pop()), load_file(Path(folder) / "trainable.safetensors")
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in saved.items()}:
            raise UsageError(f"checkpoint {folder!r} holds other parameters than this run trains")
        for name, tensor in own.items():
            tensor.copy_(saved[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


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
