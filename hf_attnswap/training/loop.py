"""Train on Accelerate in a loop that survives a kill: checkpoints are whole, and a resumed run is the same run."""

import json
import logging
import math
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..errors import UsageError
from ..integration.swapping import swapped_modules
from ..sources.files import write_whole
from .batches import Batches, model_inputs, next_tokens
from .checkpoints import Checkpoint, find_checkpoint, resume, save_checkpoint
from .state import RunState, require_checkpoints
from .watch import first_not_finite, spike

Step = Callable[[nn.Module, Tensor], Tensor]
logger = logging.getLogger(__name__)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int, end: float = 0.0, done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a scheduler of the learning rate: linear warm-up, then a cosine.

    Args:
        steps: optimiser steps of the whole run.
        warmup: steps of warm-up.
        end: what the cosine ends at, as a share of the highest learning rate.
        done: steps that the run has done before; the learning rate is a function of the number of steps alone.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
        return end + (1 - end) * cosine

    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=done - 1)


def train(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Batches,
    step_loss: Step,
    *,
    learning_rate: float,
    steps: int,
    parameters: list[nn.Parameter] | None = None,
    new_parameters_learning_rate: float | None = None,
    final_learning_rate: float = 0.0,
    warmup: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    output_dir: Path | None = None,
    checkpointing_steps: int | None = None,
    resume_from_checkpoint: str | Path | Checkpoint | None = None,
    settings: Mapping[str, Any] | None = None,
    unit: str = "tokens",
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Run `steps` optimiser steps of AdamW and return the loss of each.

    One step takes `processes x gradient accumulation x batch size` blocks, and the next step takes the blocks after
    them, however the three factors share the blocks out. The model trains in the mode (train or eval) that it is in.

    Args:
        accelerator: its gradient accumulation, mixed precision and processes are used.
        loader: the batches of token blocks.
        step_loss: `(model, batch) -> loss` of one batch of token blocks.
        learning_rate: highest learning rate.
        parameters: what trains; all that require a gradient by default.
        new_parameters_learning_rate: highest learning rate of the variants' parameters; `learning_rate` by default.
        final_learning_rate: learning rate at the end of the cosine.
        warmup: steps of linear warm-up to `learning_rate`, before a cosine to `final_learning_rate`; the rate of the
            new parameters keeps its proportion to that rate.
        weight_decay: weight decay of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        output_dir: where `checkpoints/step_N` and the log `training_log.jsonl` go; neither is written without it.
        checkpointing_steps: steps between two checkpoints; None for no checkpoints.
        resume_from_checkpoint: a checkpoint, its folder, or "latest" for the newest whole one in `output_dir`; the run
            starts anew where "latest" finds none.
        settings: what else a resumed run must have in common with the run that it continues; JSON values.
        unit: what a block is made of, for the log.
        progress: called with each step and its loss.

    Raises:
        UsageError: there is no such checkpoint, or it is of a run with other settings; or a rate is given for new
            parameters, none of which train.
        FloatingPointError: the loss is not finite; the last checkpoint stays.
        OSError: a checkpoint could not be written.
    """
    if checkpointing_steps or resume_from_checkpoint:
        require_checkpoints(accelerator)
    accumulation, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    settings = {
        "steps": steps, "learning_rate": learning_rate, "new_parameters_learning_rate": new_parameters_learning_rate,
        "final_learning_rate": final_learning_rate, "warmup": warmup, "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm, "seed": loader.seed,
        "blocks per step": processes * accumulation * loader.batch_size, "block size": loader.blocks.shape[1],
        "text": zlib.crc32(loader.blocks.numpy()), **(settings or {}),
    }  # fmt: skip
    parameters = parameters if parameters is not None else [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        _groups(model, parameters, learning_rate, new_parameters_learning_rate),
        weight_decay=weight_decay,
        fused=_fused(accelerator),
    )
    checkpoint = resume_from_checkpoint
    if isinstance(checkpoint, str | Path):
        checkpoint = find_checkpoint(checkpoint, output_dir)
    # The scheduler is not prepared: it counts optimiser steps, whatever the number of processes.
    end = final_learning_rate and final_learning_rate / learning_rate
    scheduler = warmup_cosine(optimizer, steps, warmup, end, done=len(checkpoint.losses) if checkpoint else 0)
    if accelerator.state.deepspeed_plugin is not None:  # it would read this from a prepared DataLoader
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = loader.batch_size
    model, optimizer = accelerator.prepare(model, optimizer)
    state = RunState(accelerator, model, optimizer)
    losses = resume(state, checkpoint, settings) if checkpoint else []
    log = output_dir / "training_log.jsonl" if output_dir is not None and accelerator.is_main_process else None
    if log is not None:
        _cut_log(log, len(losses))
    for step in range(len(losses) + 1, steps + 1):
        started = time.perf_counter()
        total = torch.zeros((), device=accelerator.device)
        for micro in range(accumulation):
            with accelerator.accumulate(model):
                loss = step_loss(model, _batch(accelerator, loader, step, micro))
                total += loss.detach() / accumulation
                if accelerator.sync_gradients:
                    losses.append(accelerator.reduce(total, "mean").item())
                    if not math.isfinite(losses[-1]):
                        raise _not_finite(accelerator, model, step_loss, loader, losses[-1], step, learning_rate)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(_in_order(model, optimizer), max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        jump = spike(losses)
        if jump and accelerator.is_main_process:
            logger.warning("the loss jumped to %.4g at step %d, %.1f times its mean before", losses[-1], step, jump)
        if log is not None:
            entry = {
                "step": step, "loss": losses[-1], **_rates(scheduler),
                unit: step * settings["blocks per step"] * settings["block size"],
                "seconds": round(time.perf_counter() - started, 3),
                **({"spike": round(jump, 2)} if jump else {}),
            }  # fmt: skip
            output_dir.mkdir(parents=True, exist_ok=True)
            with log.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
        scheduler.step()
        if progress is not None:
            progress(step, losses[-1])
        if checkpointing_steps and output_dir is not None and step % checkpointing_steps == 0:
            save_checkpoint(state, output_dir, {"settings": settings, "losses": losses})
    return losses


def _groups(
    model: nn.Module, parameters: list[nn.Parameter], learning_rate: float, new_learning_rate: float | None
) -> list[dict[str, Any]]:
    """Return the parameters as AdamW's groups; the variants' are the last group where they have a separate rate."""
    if new_learning_rate is None:
        return [{"params": parameters, "lr": learning_rate}]
    own = {id(p) for variant in swapped_modules(model).values() for p in variant.parameters()}
    new = [p for p in parameters if id(p) in own]
    if not new:
        raise UsageError(
            f"new_parameters_learning_rate is {new_learning_rate}, but no parameter of a swapped attention trains"
        )
    old = [p for p in parameters if id(p) not in own]
    return [*([{"params": old, "lr": learning_rate}] if old else []), {"params": new, "lr": new_learning_rate}]


def _in_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return what trains, in the order of the prepared model.

    FSDP2 replaces the parameters by other tensors in the prepared model, and under FSDP accelerate compares the list
    with the model's parameters in their order.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [p for p in model.parameters() if id(p) in trained]


def _rates(scheduler: torch.optim.lr_scheduler.LambdaLR) -> dict[str, float]:
    return dict(zip(("learning_rate", "new_parameters_learning_rate"), scheduler.get_last_lr(), strict=False))


def _fused(accelerator: Accelerator) -> bool:
    """Return whether AdamW updates all weights in one kernel, five times as fast on a CPU.

    DeepSpeed steps flat copies of the weights in another optimiser, with which the fused kernel has not been tried.
    """
    return accelerator.device.type in ("cpu", "cuda") and accelerator.distributed_type != DistributedType.DEEPSPEED


def _batch(accelerator: Accelerator, loader: Batches, step: int, micro: int) -> Tensor:
    """Return the batch that this process takes in part `micro` of a step."""
    number = (step - 1) * accelerator.gradient_accumulation_steps + micro
    return loader[number * accelerator.num_processes + accelerator.process_index].to(accelerator.device)


def _not_finite(
    accelerator: Accelerator, model: nn.Module, step_loss: Step, loader: Batches, loss: float, step: int, rate: float
) -> FloatingPointError:
    """Return the error for a step whose loss is not finite, after running the step again to see where that begins."""
    model = accelerator.unwrap_model(model, keep_torch_compile=False)

    def again() -> None:
        for micro in range(accelerator.gradient_accumulation_steps):
            with accelerator.autocast():
                step_loss(model, _batch(accelerator, loader, step, micro))

    where = first_not_finite(model, again) or "no layer of this process, run once more"
    return FloatingPointError(
        f"the loss is {loss} at step {step}: lower the learning rate ({rate}), warm it up with --num_warmup_steps, or "
        f"train without mixed precision; the first that is not finite is {where}"
    )


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token, over all tokens but the first of each row.

    The first token of a separate document follows from nothing and counts as 0, so the loss does not depend on how rows
    are batched.

    Args:
        batch: token blocks `[B, n]`, or `[B, n, 2]` with separate documents.
    """
    inputs = model_inputs(batch)
    labels = next_tokens(inputs)
    return model(**inputs, labels=labels).loss * (labels[:, 1:] != -100).float().mean()


def _cut_log(log: Path, steps: int) -> None:
    """Keep the entries of the first `steps` steps in the log; later entries come again, and the last may be torn."""
    if log.exists():
        write_whole(log, "".join(f"{line}\n" for line in log.read_text().splitlines()[:steps]).encode())
