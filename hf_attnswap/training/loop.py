"""A training loop on Accelerate that survives a kill: whole checkpoints, and the same run after resuming."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from ..errors import UsageError

Step = Callable[[nn.Module, Tensor], Tensor]


class SeededOrder(Sampler[int]):
    """Every epoch in an order of its own that depends on the seed and the epoch alone, so that it can be resumed."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def batches(blocks: Tensor, batch_size: int, seed: int) -> DataLoader:
    """A loader over token blocks `[N, n]`, shuffled anew in every epoch. UsageError where they do not fill a batch."""
    if len(blocks) < batch_size:
        raise UsageError(f"the training text gives {len(blocks)} blocks, less than one batch of {batch_size}")
    return DataLoader(blocks, batch_size=batch_size, sampler=SeededOrder(len(blocks), seed), drop_last=True)


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine to zero, over `steps` optimiser steps."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader,
    step_loss: Step,
    *,
    learning_rate: float,
    steps: int,
    parameters: list[nn.Parameter] | None = None,
    warmup: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    output_dir: Path | None = None,
    checkpointing_steps: int | None = None,
    resume_from_checkpoint: str | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Run `steps` optimiser steps of AdamW and return the loss of each.

    Args:
        accelerator: its gradient accumulation, mixed precision and processes are used.
        step_loss: `(model, batch) -> loss` of one batch of token blocks.
        parameters: what trains; all that require a gradient by default.
        warmup: steps of linear warm-up before a cosine to zero.
        output_dir: where `checkpoints/step_N` and the log `training_log.jsonl` go; neither is written without it.
        checkpointing_steps: a checkpoint every so many steps; None for none.
        resume_from_checkpoint: a checkpoint folder, or "latest" for the newest whole one in `output_dir`.
        progress: called with the step and its loss.

    Raises:
        UsageError: nothing to resume from.
        FloatingPointError: the loss is not finite; the last checkpoint stays.
    """
    parameters = parameters if parameters is not None else [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    scheduler = warmup_cosine(optimizer, steps, warmup)
    # The scheduler counts optimiser steps, whatever the number of processes.
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(scheduler)
    done, losses = 0, []
    if resume_from_checkpoint:
        checkpoint = find_checkpoint(resume_from_checkpoint, output_dir)
        accelerator.load_state(str(checkpoint))
        losses = json.loads((checkpoint / "losses.json").read_text())
        done = len(losses)
    model.train()
    accumulation = accelerator.gradient_accumulation_steps
    stream = _stream(accelerator, loader, skip=done * accumulation)
    started = time.perf_counter()
    while done < steps:
        total = 0.0
        for _ in range(accumulation):
            with accelerator.accumulate(model):
                loss = step_loss(model, next(stream))
                total += accelerator.reduce(loss.detach(), "mean").item() / accumulation
                if not math.isfinite(total):
                    raise FloatingPointError(
                        f"the loss is {total} at step {done + 1}: lower the learning rate ({learning_rate})"
                    )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
        done += 1
        losses.append(total)
        if output_dir is not None and accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            with (output_dir / "training_log.jsonl").open("a") as log:
                entry = {"step": done, "loss": total, "seconds": round(time.perf_counter() - started, 3)}
                log.write(json.dumps(entry) + "\n")
        if progress is not None:
            progress(done, total)
        if checkpointing_steps and output_dir is not None and done % checkpointing_steps == 0:
            save_checkpoint(accelerator, output_dir, losses)
    return losses


def _stream(accelerator: Accelerator, loader: DataLoader, skip: int) -> Iterator[Tensor]:
    """Batches without end, from where a run that has taken `skip` of them would go on."""
    epoch, skip = divmod(skip, len(loader))
    while True:
        # One seed per epoch, so that the order after resuming is that of an undisturbed run.
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        yield from accelerator.skip_first_batches(loader, skip) if skip else loader
        epoch, skip = epoch + 1, 0


def save_checkpoint(accelerator: Accelerator, output_dir: Path, losses: list[float]) -> Path:
    """`output_dir/checkpoints/step_N`, which appears whole by rename; older ones go once it is there."""
    folder = output_dir / "checkpoints"
    final, partial = folder / f"step_{len(losses)}", folder / f"partial_{len(losses)}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "losses.json").write_text(json.dumps(losses))
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for other in folder.iterdir():
            if other != final:
                shutil.rmtree(other, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(asked: str, output_dir: Path | None) -> Path:
    """The folder to resume from. UsageError where there is none, or it is not a whole checkpoint."""
    if asked == "latest":
        found = list((output_dir / "checkpoints").glob("step_*")) if output_dir is not None else []
        if not found:
            raise UsageError(f"resume_from_checkpoint is 'latest', but there is no checkpoint in {str(output_dir)!r}")
        return max(found, key=lambda path: int(path.name.removeprefix("step_")))
    path = Path(asked)
    if not (path / "losses.json").is_file():
        raise UsageError(f"resume_from_checkpoint {asked!r} is not a checkpoint of this package")
    return path


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    return model(input_ids=batch, labels=batch, use_cache=False).loss
