"""A training loop on Accelerate that survives a kill: whole checkpoints, and the same run after resuming."""

import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UsageError
from ..files import write_whole
from .batches import Batches

Step = Callable[[nn.Module, Tensor], Tensor]


def warmup_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int, end: float = 0.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine to the share `end` of the learning rate, over `steps` optimiser steps."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
        return end + (1 - end) * cosine

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Batches,
    step_loss: Step,
    *,
    learning_rate: float,
    steps: int,
    parameters: list[nn.Parameter] | None = None,
    final_learning_rate: float = 0.0,
    warmup: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    output_dir: Path | None = None,
    checkpointing_steps: int | None = None,
    resume_from_checkpoint: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    unit: str = "tokens",
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Run `steps` optimiser steps of AdamW and return the loss of each.

    One step takes `processes x gradient accumulation x batch size` blocks, and the next step the blocks after them,
    however these three share them out. The model trains in the mode (train or eval) that it is in.

    Args:
        accelerator: its gradient accumulation, mixed precision and processes are used.
        step_loss: `(model, batch) -> loss` of one batch of token blocks.
        parameters: what trains; all that require a gradient by default.
        warmup: steps of linear warm-up to `learning_rate`, before a cosine to `final_learning_rate`.
        output_dir: where `checkpoints/step_N` and the log `training_log.jsonl` go; neither is written without it.
        checkpointing_steps: a checkpoint every so many steps; None for none.
        resume_from_checkpoint: a checkpoint folder, or "latest" for the newest whole one in `output_dir`, which
            starts anew where there is none.
        settings: what else a resumed run must have in common with the one that it continues; JSON values.
        unit: what a block is made of, for the log.
        progress: called with the step and its loss.

    Raises:
        UsageError: no such checkpoint, or one of a run with other settings.
        FloatingPointError: the loss is not finite; the last checkpoint stays.
    """
    accumulation, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    settings = {
        "steps": steps, "learning_rate": learning_rate, "final_learning_rate": final_learning_rate, "warmup": warmup,
        "weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "seed": loader.seed,
        "blocks per step": processes * accumulation * loader.batch_size, "block size": loader.blocks.shape[1],
        "text": zlib.crc32(loader.blocks.numpy()), **(settings or {}),
    }  # fmt: skip
    parameters = parameters if parameters is not None else [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    # The scheduler is not prepared: it counts optimiser steps, whatever the number of processes.
    scheduler = warmup_cosine(optimizer, steps, warmup, final_learning_rate and final_learning_rate / learning_rate)
    if accelerator.state.deepspeed_plugin is not None:  # it would read this from a prepared DataLoader
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = loader.batch_size
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    _checkpoint_what_trains(accelerator)
    checkpoint = resume_from_checkpoint and find_checkpoint(resume_from_checkpoint, output_dir)
    losses = _resume(accelerator, checkpoint, settings) if checkpoint else []
    log = output_dir / "training_log.jsonl" if output_dir is not None and accelerator.is_main_process else None
    if log is not None:
        _cut_log(log, len(losses))
    for step in range(len(losses) + 1, steps + 1):
        started = time.perf_counter()
        total = torch.zeros((), device=accelerator.device)
        for micro in range(accumulation):
            number = ((step - 1) * accumulation + micro) * processes + accelerator.process_index
            with accelerator.accumulate(model):
                loss = step_loss(model, loader[number].to(accelerator.device))
                total += loss.detach() / accumulation
                if accelerator.sync_gradients:
                    losses.append(accelerator.reduce(total, "mean").item())
                    if not math.isfinite(losses[-1]):
                        raise FloatingPointError(
                            f"the loss is {losses[-1]} at step {step}: lower the learning rate ({learning_rate})"
                        )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    # Read from the optimiser: FSDP2 puts other tensors in the place of the parameters.
                    groups = optimizer.param_groups
                    accelerator.clip_grad_norm_([p for group in groups for p in group["params"]], max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        if log is not None:
            entry = {
                "step": step, "loss": losses[-1], "learning_rate": scheduler.get_last_lr()[0],
                unit: step * settings["blocks per step"] * settings["block size"],
                "seconds": round(time.perf_counter() - started, 3),
            }  # fmt: skip
            output_dir.mkdir(parents=True, exist_ok=True)
            with log.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
        scheduler.step()
        if progress is not None:
            progress(step, losses[-1])
        if checkpointing_steps and output_dir is not None and step % checkpointing_steps == 0:
            save_checkpoint(accelerator, output_dir, {"settings": settings, "losses": losses})
    return losses


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def save_checkpoint(accelerator: Accelerator, output_dir: Path, run: dict[str, Any]) -> Path:
    """`output_dir/checkpoints/step_N`, which appears whole by rename; older ones go once it is there.

    Args:
        run: the settings, and the losses of all steps so far.
    """
    step = len(run["losses"])
    folder = output_dir / "checkpoints"
    final, partial = folder / f"step_{step}", folder / f"partial_{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "run.json").write_text(json.dumps(run))
        for path in partial.rglob("*"):
            _flush(path)
        if final.exists():
            _remove(final)
        os.replace(partial, final)
        for other in list(folder.iterdir()):
            if other != final:
                _remove(other)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(asked: str | Path, output_dir: Path | None) -> Path | None:
    """The folder to resume from; None where "latest" is asked for and there is none.

    Raises:
        UsageError: `asked` is a folder that is not a whole checkpoint.
    """
    if asked == "latest":
        found = list((output_dir / "checkpoints").glob("step_*")) if output_dir is not None else []
        return max(found, key=lambda path: int(path.name.removeprefix("step_")), default=None)
    path = Path(asked)
    if not (path / "run.json").is_file():
        raise UsageError(f"resume_from_checkpoint {str(asked)!r} is not a checkpoint of this package")
    return path


def _resume(accelerator: Accelerator, checkpoint: Path, settings: dict[str, Any]) -> list[float]:
    """Load the checkpoint and return the losses so far."""
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


def _checkpoint_what_trains(accelerator: Accelerator) -> None:
    """Leave the frozen weights out of checkpoints, under names that do not depend on the number of processes.
    FSDP and DeepSpeed write the model themselves and hand these hooks nothing."""

    def trainable(model: nn.Module) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}

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


def _cut_log(log: Path, steps: int) -> None:
    """Keep the entries of the steps that are done: those after the checkpoint come again, the last may be torn."""
    if log.exists():
        write_whole(log, "".join(f"{line}\n" for line in log.read_text().splitlines()[:steps]).encode())


def _flush(path: Path) -> None:
    """To the disk, so that a rename cannot become visible before what it names."""
    if path.is_file():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _remove(folder: Path) -> None:
    """Remove a checkpoint; one that is half removed must not look whole."""
    doomed = folder.with_name(f"partial_{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
