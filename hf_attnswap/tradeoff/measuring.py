"""Measure every arm of a comparison on one model: swap, align variants with parameters, evaluate, time, report.

What is measured is kept arm by arm and round by round in `output_dir/measured`. Each file appears whole by rename, so
an interrupted run continues where it stopped when the same command is given again.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import attentions
from ..attentions import Heads
from ..config import NAME
from ..errors import UsageError
from ..evaluation.checks import check_swap
from ..evaluation.diagnose import diagnose
from ..evaluation.perplexity import count_units, perplexity
from ..evaluation.tasks import check_tasks, text_tokens
from ..integration.finding import head_shape, inspect
from ..integration.swapping import restore, swapped_modules
from ..ops.backends import watch
from ..report.types import Data, Report
from ..sources.files import write_whole
from ..sources.texts import TextSource, token_blocks
from ..training.align import aligning, alignment_loss, calibrate, trainable_parameters
from ..training.batches import batches
from ..training.loop import train
from . import progress
from .arms import Arm, Settings, build, share_weights
from .machine import describe_model, machine, now, versions
from .progress import Course, Progress
from .rows import row
from .speed import Rounds, measure_speed
from .task_runs import measure_tasks

FORMAT = 5  # of the files in `measured`
SPEED = "speed.json"


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training_text: TextSource,
    evaluation_text: TextSource | None,
    settings: Settings,
    output_dir: Path,
    *,
    model_name: str,
    command: str,
    observe: Callable[[Progress], None] = lambda progress: None,
) -> Report:
    """Measure all arms and return the report.

    Args:
        evaluation_text: held-out text; where it is None, the last fifth of the training text is held out.
        settings: what is measured.
        output_dir: a new or empty folder, or the folder of an earlier run with the same settings, model and texts.
        model_name: name of the model in the report.
        command: the command of the run, for the report.
        observe: called at every step with the progress of the whole run.

    Raises:
        UsageError: an arm or task is unknown, a text is too short, settings do not fit together, or `output_dir` holds
            something else.
    """
    arms = [Arm.parse(text) for text in dict.fromkeys(("softmax", *settings.arms))]
    check_tasks(settings.tasks)
    train_blocks, eval_tokens = _texts(tokenizer, training_text, evaluation_text, settings)
    measured = _open(output_dir, settings, arms, model_name, training_text, evaluation_text)
    course = _course(arms, model, settings, measured, observe)
    results = {
        arm.label: _quality(arm, model, tokenizer, train_blocks, eval_tokens, settings, measured, course)
        for arm in arms
    }
    units = {
        context: count_units(tokenizer, eval_tokens, context, _blocks(settings, context))
        for context in settings.context_lengths
    }
    runs = _speed(arms, results, model, eval_tokens, settings, measured, course)
    return Report(
        kind="tradeoff",
        title=f"Attention swaps in {model_name}",
        model=describe_model(model, model_name),
        machine=machine(model.device),
        versions=versions(),
        date=now(),
        command=command,
        seeds=[settings.seed],
        data=Data(
            training=_called(training_text),
            training_size=train_blocks.numel(),
            evaluation=_called(evaluation_text or training_text),
            evaluation_size=eval_tokens.numel(),
            fingerprint=hashlib.sha256(eval_tokens.numpy().tobytes()).hexdigest()[:16],
        ),
        arms=[row(arm, results, runs, units) for arm in arms],
    )


def _course(
    arms: Sequence[Arm], model: PreTrainedModel, settings: Settings, folder: Path, observe: Callable[[Progress], None]
) -> Course:
    """Return the course of the run: the weight of all steps, and of the steps that an earlier run has done."""
    layers = inspect(model)
    heads = head_shape(model, layers)
    weights = [progress.quality(arm, settings, len(layers), _is_aligned(arm, heads, settings)) for arm in arms]
    rounds = {length: progress.speed(settings, length) * len(arms) for length in settings.lengths}
    path = folder / SPEED
    timed = json.loads(path.read_text()) if path.is_file() else {}
    done = sum(weight for arm, weight in zip(arms, weights, strict=True) if _file(folder, arm, ".json").is_file())
    done += sum(weight * len(timed.get(str(length), [])) for length, weight in rounds.items())
    return Course(observe, sum(weights) + settings.rounds * sum(rounds.values()), done)


def _is_aligned(arm: Arm, heads: Heads, settings: Settings) -> bool:
    """Return whether the run trains the arm: a variant with parameters, and not of a conversion."""
    if arm.conversion is not None or arm.attention == "softmax" or not settings.align_tokens:
        return False
    return any(True for _ in attentions.get(arm.attention)(heads, **arm.options).parameters())


def _texts(tokenizer, training_text, evaluation_text, settings: Settings) -> tuple[Tensor, Tensor]:
    for length in set(settings.train_lengths) - set(settings.lengths):
        raise UsageError(f"train_lengths has {length}, which is none of the lengths {list(settings.lengths)}")
    longest = max(*(2 * length for length in settings.context_lengths), *settings.lengths, settings.block_size)
    longest = max(longest, text_tokens(settings.tasks))
    blocks = token_blocks(training_text, tokenizer, settings.block_size)
    if evaluation_text is None:
        held_out = math.ceil(len(blocks) / 5)
        blocks, evaluation = blocks[:-held_out], blocks[-held_out:].reshape(-1)
    else:
        evaluation = token_blocks(evaluation_text, tokenizer, settings.block_size).reshape(-1)
    if settings.max_eval_tokens < 2 * max(settings.context_lengths):
        raise UsageError(
            f"max_eval_tokens is {settings.max_eval_tokens}, less than two blocks of {max(settings.context_lengths)}: "
            "without a second one there is no telling how sure a perplexity is"
        )
    if evaluation.numel() < longest or len(blocks) == 0:
        raise UsageError(
            f"the text leaves {evaluation.numel()} tokens for evaluation and {blocks.numel()} for training; "
            f"{longest} and {settings.block_size} are needed: give more text or smaller lengths"
        )
    return blocks, evaluation


def _called(text: TextSource) -> str:
    """Return the name of a text; for a file, without the folders that hold it."""
    return Path(text.name).name if Path(text.name).is_file() else text.name


def _open(
    output_dir: Path, settings: Settings, arms: Sequence[Arm], model_name: str, *texts: TextSource | None
) -> Path:
    """Return the folder of partial results: a new one, or that of a run with the same settings."""
    folder = output_dir / "measured"
    saved = {a.label: (a.conversion.folder / "config.json").stat().st_mtime_ns for a in arms if a.conversion}
    run = {"format": FORMAT, "model": model_name, "texts": [t and asdict(t) for t in texts], "saved": saved}
    wanted = json.loads(json.dumps(asdict(settings) | run))
    known = folder / "settings.json"
    if known.is_file():
        found = json.loads(known.read_text())
        for key in wanted:
            if found.get(key) != wanted[key]:
                raise UsageError(
                    f"output folder {str(output_dir)!r} holds a run with {key} = {found.get(key)!r}, "
                    f"not {wanted[key]!r}: name another folder to start anew"
                )
        return folder
    if output_dir.exists() and (output_dir.is_file() or any(output_dir.iterdir())):
        raise UsageError(f"output folder {str(output_dir)!r} is not empty and holds no earlier run: name another one")
    folder.mkdir(parents=True)
    _write_json(known, wanted)
    return folder


def _write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1).encode())


def _file(folder: Path, arm: Arm, suffix: str) -> Path:
    return folder / (re.sub(r"[^A-Za-z0-9+=._-]", "_", arm.label) + suffix)


def _quality(
    arm: Arm, model, tokenizer, train_blocks, eval_tokens, settings: Settings, folder: Path, course: Course
) -> dict:
    """Return what was measured of the quality of one arm: align and evaluate it, or read what an earlier run kept."""
    path = _file(folder, arm, ".json")
    if path.is_file():
        course.say(f"{arm.label}: already measured")
        return json.loads(path.read_text())
    result: dict[str, Any] = {"status": "measured", "reason": None, "alignment": None, "new_parameters": 0}
    result |= {"nll": {}, "by_position": {}, "checks": [], "diagnostics": None, "tasks": [], "swapped": [], "kept": 0}
    result["backends"] = {}
    try:
        swapped = build(arm, model)
        own = [p for attention in swapped_modules(swapped).values() for p in attention.parameters()]
        result["new_parameters"] = sum(p.numel() for p in own)
        saved = (getattr(swapped.config, NAME, None) or {}).get("swapped") or []
        result["swapped"] = list(saved)
        result["kept"] = sum(entry.swapped is None for entry in inspect(swapped))
        if own and settings.align_tokens and arm.conversion is None:
            result["alignment"] = _align(arm, swapped, train_blocks, settings, course)
            parameters = {name: p for name, p in swapped.state_dict().items() if ".attnswap." in name}
            write_whole(_file(folder, arm, ".safetensors"), save(parameters))
        if result["swapped"]:
            course.say(f"{arm.label}: checks")
            original = restore(share_weights(swapped)) if arm.conversion else model
            result["checks"] = [
                vars(check) | {"passed": check.passed} for check in check_swap(original, swapped, eval_tokens)
            ]
            course.advance(progress.CHECKS)
        for check in result["checks"]:
            if not check["passed"]:
                off = "" if math.isnan(check["worst"]) else f" (by {check['worst']:.2g} of its spread)"
                raise RuntimeError(f"it fails the check {check['name']!r}: {check['says']}{off}")
        for context in settings.context_lengths:
            course.say(f"{arm.label}: perplexity at context {context}")
            with watch() as ran:
                found = perplexity(swapped, eval_tokens, context, _blocks(settings, context))
            result["backends"] = {op: sorted(backends) for op, backends in ran.items()}
            result["nll"][str(context)] = found.nll
            result["by_position"][str(context)] = found.by_position
            course.advance(settings.max_eval_tokens)
        if settings.tasks:
            result["tasks"] = measure_tasks(
                swapped, model, tokenizer, eval_tokens, settings, folder / "answers.json",
                lambda line: course.say(f"{arm.label}: {line}"),
            )  # fmt: skip
            course.advance(progress.tasks(settings))
        if settings.diagnose_tokens and result["swapped"]:
            text = eval_tokens.reshape(-1)[: settings.diagnose_tokens][None]
            result["diagnostics"] = diagnose(swapped, text, lambda line: course.say(f"{arm.label}: {line}"))
            course.advance(progress.diagnosis(settings, len(inspect(model))))
        if not all(math.isfinite(x) for nll in result["nll"].values() for x in nll):
            result |= {"status": "failed", "reason": "its perplexity is not finite", "nll": {}}
    except Exception as error:
        wrong_use = isinstance(error, UsageError) and arm.label == "softmax"  # so it is in every arm
        if wrong_use or os.environ.get("ATTNSWAP_DEBUG"):
            raise
        result |= {"status": "failed", "reason": (str(error) or repr(error)).splitlines()[0]}
        course.say(f"{arm.label}: failed: {result['reason']}")
    _write_json(path, result)
    return result


def _blocks(settings: Settings, context: int) -> int:
    return settings.max_eval_tokens // context


def _align(arm: Arm, model: nn.Module, blocks: Tensor, settings: Settings, course: Course) -> dict[str, Any]:
    batch_size = settings.per_device_train_batch_size
    steps = max(1, settings.align_tokens // (batch_size * blocks.shape[1]))
    parameters = trainable_parameters(model)
    accelerator = Accelerator(cpu=next(model.parameters()).device.type == "cpu")
    started = time.perf_counter()

    def said(step: int, loss: float) -> None:
        course.advance(progress.alignment(settings) / steps)
        course.say(f"{arm.label}: alignment step {step} of {steps}, loss {loss:.4f}")

    calibrate(model, blocks[: 2 * batch_size])
    with aligning(model) as losses:
        history = train(
            accelerator,
            model,
            batches(blocks, batch_size, settings.seed),
            lambda model, batch: alignment_loss(model, batch, losses),
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


def _speed(arms, results, model, eval_tokens, settings: Settings, folder: Path, course: Course) -> Rounds:
    models = {
        arm.label: build(arm, model, _file(folder, arm, ".safetensors"))
        for arm in arms
        if results[arm.label]["status"] == "measured"
    }
    return measure_speed(models, eval_tokens, settings, folder / SPEED, course)
