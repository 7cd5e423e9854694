"""Measure the quality of one arm: align it, check it, evaluate it. What fails is said, and takes nothing else along."""

import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import NAME
from ..errors import UsageError
from ..evaluation.checks import TOKENS, check_swap
from ..evaluation.diagnose import diagnose
from ..evaluation.perplexity import perplexity
from ..evaluation.tasks import apart
from ..integration.finding import inspect
from ..integration.objectives import objective
from ..integration.swapping import restore, softmax_groups, swapped_modules
from ..ops.backends import watch
from ..sources.files import write_whole
from ..training.align import aligning, alignment_loss, calibrate, trainable_parameters
from ..training.batches import batches
from ..training.loop import train
from . import progress
from .arms import Arm, Settings, build, share_weights
from .held_out import HeldOut
from .progress import Course
from .task_runs import measure_tasks


def measure_quality(
    arm: Arm,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_blocks: Tensor,
    held_out: HeldOut,
    settings: Settings,
    file: Callable[[str], Path],
    answers: Path,
    course: Course,
) -> dict[str, Any]:
    """Return what was measured of the quality of an arm, as JSON values.

    An arm that cannot be swapped, aligned or checked is failed, with the reason, and nothing else is measured of it
    (`sound` is False). Of a sound arm each perplexity, group of tasks and diagnosis stands by itself: where one fails,
    the arm is failed with the reason, and has the others.

    Args:
        model: the model that is compared, not swapped.
        train_blocks: int64 `[N, block_size]`, for the alignment.
        file: makes the path of a file of this arm from its suffix.
        answers: the file of the answers of softmax to the tasks.

    Raises:
        UsageError: softmax itself cannot be measured as was asked, so no arm can.
    """
    result: dict[str, Any] = {"status": "measured", "reason": None, "alignment": None, "new_parameters": 0}
    result |= {"nll": {}, "by_position": {}, "checks": [], "diagnostics": None, "tasks": [], "swapped": [], "kept": 0}
    result |= {"kept_groups": [0, 0]}
    result |= {"backends": {}, "given": max(1, len(held_out.start)), "sound": False}
    failures: list[str] = []

    def failed(error: Exception, what: str) -> None:
        wrong_use = isinstance(error, UsageError) and arm.label == "softmax"  # so it is in every arm
        if wrong_use or os.environ.get("ATTNSWAP_DEBUG"):
            raise error
        failures.append(f"{what}{(str(error).strip() or repr(error)).splitlines()[0]}")
        course.say(f"{arm.label}: failed: {failures[-1]}")

    def part(what: str, weight: float, run: Callable[[], None]) -> None:
        course.say(f"{arm.label}: {what}")
        try:
            run()
        except Exception as error:
            failed(error, f"{what}: ")
        course.advance(weight)

    def context_perplexity(context: int) -> None:
        with watch() as ran:
            found = perplexity(swapped, held_out.tokens, context, settings.blocks(context), start=held_out.start)
        result["backends"] = {op: sorted(backends) for op, backends in ran.items()}
        if not all(map(math.isfinite, found.nll)):
            raise FloatingPointError("it is not finite")
        result["nll"][str(context)] = found.nll
        result["by_position"][str(context)] = found.by_position

    def say(line: str) -> None:
        course.say(f"{arm.label}: {line}")

    def tasks(chosen: list[str]) -> None:
        result["tasks"] += measure_tasks(swapped, model, tokenizer, chosen, held_out, settings, answers, say)

    def diagnosis() -> None:
        mask = getattr(tokenizer, "mask_token_id", None)
        result["diagnostics"] = diagnose(swapped, held_out.begun(settings.diagnose_tokens)[None], say, mask)

    try:
        swapped = _sound(arm, model, train_blocks, held_out, settings, file, course, result)
        result["sound"] = True
    except Exception as error:
        failed(error, "")
        return result | {"status": "failed", "reason": failures[0]}
    writes = objective(model) == "next tokens"
    for context in settings.context_lengths if writes else ():
        weight = settings.blocks(context) * context
        part(f"perplexity at context {context}", weight, partial(context_perplexity, context))
    groups = apart(settings.tasks)
    for chosen in groups:
        part(", ".join(chosen), progress.tasks(settings) / len(groups), partial(tasks, chosen))
    if not writes:
        course.advance(settings.eval_tokens)
    if settings.diagnose_tokens and result["swapped"]:
        part("diagnosis", progress.diagnosis(settings, len(inspect(model))), diagnosis)
    return result | ({"status": "failed", "reason": "; ".join(failures)} if failures else {})


def _sound(
    arm: Arm,
    model: PreTrainedModel,
    train_blocks: Tensor,
    held_out: HeldOut,
    settings: Settings,
    file: Callable[[str], Path],
    course: Course,
    result: dict[str, Any],
) -> PreTrainedModel:
    """Return the model of an arm, aligned and checked, and note in `result` what was found on the way."""
    swapped = build(arm, model)
    own = [p for attention in swapped_modules(swapped).values() for p in attention.parameters()]
    result["new_parameters"] = sum(p.numel() for p in own)
    result["swapped"] = list((getattr(swapped.config, NAME, None) or {}).get("swapped") or [])
    result["kept"] = sum(entry.swapped is None for entry in inspect(swapped))
    result["kept_groups"] = list(softmax_groups(swapped))
    if own and settings.align_tokens and arm.conversion is None:
        result["alignment"] = _align(arm, swapped, train_blocks, settings, course)
        parameters = {name: p for name, p in swapped.state_dict().items() if ".attnswap." in name}
        write_whole(file(".safetensors"), save(parameters))
    if result["swapped"]:
        course.say(f"{arm.label}: checks")
        original = restore(share_weights(swapped)) if arm.conversion else model
        checks = check_swap(original, swapped, held_out.begun(min(TOKENS, held_out.tokens.numel())))
        result["checks"] = [vars(check) | {"passed": check.passed} for check in checks]
        course.advance(progress.CHECKS)
    for check in result["checks"]:
        if not check["passed"]:
            off = "" if math.isnan(check["worst"]) else f" (by {check['worst']:.2g} of its spread)"
            raise RuntimeError(f"it fails the check {check['name']!r}: {check['says']}{off}")
    return swapped


def _align(arm: Arm, model: PreTrainedModel, blocks: Tensor, settings: Settings, course: Course) -> dict[str, Any]:
    batch_size = settings.per_device_train_batch_size
    steps = max(1, settings.align_tokens // (batch_size * blocks.shape[1]))
    parameters = trainable_parameters(model)
    accelerator = Accelerator(cpu=next(model.parameters()).device.type == "cpu")
    writes, started = objective(model) == "next tokens", time.perf_counter()

    def inputs(batch: Tensor) -> Tensor | Mapping[str, Tensor]:
        return batch if writes else {"input_ids": batch, "attention_mask": torch.ones_like(batch)}

    def said(step: int, loss: float) -> None:
        course.advance(progress.alignment(settings) / steps)
        course.say(f"{arm.label}: alignment step {step} of {steps}, loss {loss:.4f}")

    calibrate(model, inputs(blocks[: 2 * batch_size]))
    with aligning(model) as losses:
        history = train(
            accelerator,
            model,
            batches(blocks, batch_size, settings.seed),
            lambda model, batch: alignment_loss(model, inputs(batch), losses),
            parameters=parameters,
            learning_rate=settings.learning_rate,
            steps=steps,
            warmup=steps // 20,
            progress=said,
        )
    accelerator.free_memory()
    model.eval()
    return {
        "tokens": steps * batch_size * blocks.shape[1],
        "seconds": round(time.perf_counter() - started, 1),
        "first_loss": history[0],
        "last_loss": history[-1],
    }
