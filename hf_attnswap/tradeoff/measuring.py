"""Measure every arm of a comparison on one model: swap, align variants with parameters, evaluate, time, report.

What is measured is kept arm by arm and round by round in `output_dir/measured`. Each file appears whole by rename, so
an interrupted run continues where it stopped when the same command is given again.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import attentions
from ..errors import UsageError
from ..evaluation.perplexity import count_units
from ..evaluation.predictions import require_predictions
from ..evaluation.tasks import check_tasks, quality_task
from ..integration.finding import head_shape, inspect
from ..integration.objectives import objective, require_positions
from ..report.types import Control, Data, Report
from ..sources.files import holds_something, write_whole
from ..sources.structured import read_json
from ..sources.texts import TextSource
from . import progress
from .arms import Arm, Settings, build
from .controls import with_equal_controls
from .held_out import HeldOut, read_texts
from .machine import describe_model, machine, now, versions
from .progress import Course, Progress
from .quality import measure_quality
from .rows import row, stage_of
from .speed import Rounds, measure_speed

FORMAT = 7  # of the files in `measured`
SPEED = "speed.json"
CONTROLS = "controls.json"


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
    _check_arms(arms)
    task = quality_task(model)
    settings = settings if task is None else replace(settings, tasks=tuple(dict.fromkeys((task, *settings.tasks))))
    _check_settings(settings, model, tokenizer, aligned=any(_is_aligned(arm, model, settings) for arm in arms))
    described = describe_model(model, model_name)
    train_blocks, held_out = read_texts(tokenizer, training_text, evaluation_text, settings, task is not None)
    measured = _open(output_dir, settings, arms, model_name, training_text, evaluation_text)
    controls: dict[str, list[Control]] = {}
    if settings.equal_controls:
        say = partial(_before, observe)
        arms, controls = with_equal_controls(arms, model, max(settings.lengths), measured / CONTROLS, say)
        _check_arms(arms)
    course = _course(arms, model, settings, measured, observe)
    results = {
        arm.label: _quality(arm, model, tokenizer, train_blocks, held_out, settings, measured, course) for arm in arms
    }
    units = {
        context: count_units(tokenizer, held_out.tokens, context, settings.blocks(context), start=held_out.start)
        for context in settings.context_lengths
    }
    runs = _speed(arms, results, model, held_out, settings, measured, course)
    return Report(
        kind="tradeoff",
        title=f"Attention swaps in {model_name}",
        model=described,
        machine=machine(model.device),
        versions=versions(),
        date=now(),
        command=command,
        seeds=[settings.seed],
        data=Data(
            training=_called(training_text),
            training_size=train_blocks.numel(),
            evaluation=_called(evaluation_text or training_text),
            evaluation_size=held_out.tokens.numel(),
            fingerprint=hashlib.sha256(held_out.tokens.numpy().tobytes()).hexdigest()[:16],
        ),
        arms=[row(arm, results, runs, units, controls.get(arm.label, ())) for arm in arms],
    )


def _before(observe: Callable[[Progress], None], line: str) -> None:
    """Report what is done before it is known which arms there are."""
    observe(Progress(line, 0.0, 0.0))


def _check_arms(arms: Sequence[Arm]) -> None:
    """Raise UsageError where two arms would share a file, or what a conversion says of its training cannot be told."""
    seen: dict[Path, str] = {}
    for arm in arms:
        file = _file(Path(), arm, "")
        if file in seen:
            raise UsageError(f"two arms are called {seen[file]!r} and {arm.label!r}: give their folders other names")
        seen[file] = arm.label
        for stage in arm.conversion.training if arm.conversion else ():
            try:
                stage_of(stage)
            except (ValueError, TypeError) as error:
                said = " ".join(str(error).split())
                raise UsageError(f"{arm.conversion.folder}: what it says of its training is damaged: {said}") from None


def _check_settings(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, aligned: bool
) -> None:
    """Raise UsageError, before anything is measured, where the model cannot do what is asked for."""
    predicts = objective(model)
    check_tasks(settings.tasks, predicts=predicts)
    writes = predicts == "next tokens"
    longest, more = max(settings.lengths), settings.decode_tokens if writes else 0
    require_positions(model, longest + more, f"--length {longest} with --decode_tokens {more}" if more else "--length")
    require_positions(model, max(settings.context_lengths), "--context_length")
    require_positions(model, max(settings.task_lengths, default=0), "--task_length")
    require_positions(model, settings.diagnose_tokens, "--diagnose_tokens")
    if aligned:
        require_positions(model, settings.block_size, "--block_size")
    if settings.diagnose_tokens:
        require_predictions(model, getattr(tokenizer, "mask_token_id", None))


def _course(
    arms: Sequence[Arm], model: PreTrainedModel, settings: Settings, folder: Path, observe: Callable[[Progress], None]
) -> Course:
    """Return the course of the run: the weight of all steps, and of the steps that an earlier run has done."""
    layers = inspect(model)
    weights = [progress.quality(arm, settings, len(layers), _is_aligned(arm, model, settings)) for arm in arms]
    rounds = {length: progress.speed(settings, length) * len(arms) for length in settings.lengths}
    path = folder / SPEED
    timed = read_json(path) if path.is_file() else {}
    done = sum(weight for arm, weight in zip(arms, weights, strict=True) if _file(folder, arm, ".json").is_file())
    done += sum(weight * len(timed.get(str(length), [])) for length, weight in rounds.items())
    return Course(observe, sum(weights) + settings.rounds * sum(rounds.values()), done)


def _is_aligned(arm: Arm, model: PreTrainedModel, settings: Settings) -> bool:
    """Return whether the run trains the arm: a variant with parameters, and not of a conversion."""
    if arm.conversion is not None or arm.attention == "softmax" or not settings.align_tokens:
        return False
    heads = head_shape(model, inspect(model))
    return any(True for _ in attentions.get(arm.attention)(heads, **arm.options).parameters())


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
        found = read_json(known)
        for key in wanted:
            if found.get(key) != wanted[key]:
                raise UsageError(
                    f"output folder {str(output_dir)!r} holds a run with {key} = {found.get(key)!r}, "
                    f"not {wanted[key]!r}: name another folder to start anew"
                )
        return folder
    if output_dir.is_file() or holds_something(output_dir):
        raise UsageError(f"output folder {str(output_dir)!r} is not empty and holds no earlier run: name another one")
    folder.mkdir(parents=True)
    _write_json(known, wanted)
    return folder


def _write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1).encode())


def _file(folder: Path, arm: Arm, suffix: str) -> Path:
    return folder / (re.sub(r"[^A-Za-z0-9+=._-]", "_", arm.label) + suffix)


def _quality(
    arm: Arm,
    model,
    tokenizer,
    train_blocks: Tensor,
    held_out: HeldOut,
    settings: Settings,
    folder: Path,
    course: Course,
) -> dict[str, Any]:
    """Return what was measured of the quality of one arm: measure it, or read what an earlier run kept."""
    path = _file(folder, arm, ".json")
    if path.is_file():
        course.say(f"{arm.label}: already measured")
        return read_json(path)
    result = measure_quality(
        arm, model, tokenizer, train_blocks, held_out, settings, partial(_file, folder, arm), folder / "answers.json",
        course,
    )  # fmt: skip
    _write_json(path, result)
    return result


def _speed(
    arms: Sequence[Arm], results: dict[str, dict], model, held_out: HeldOut, settings: Settings, folder: Path, course
) -> Rounds:
    """Time the arms that are sound. One whose model cannot be built again is failed, and the others are timed."""
    models = {}
    for arm in arms:
        result = results[arm.label]
        if not result["sound"]:
            continue
        try:
            models[arm.label] = build(arm, model, _file(folder, arm, ".safetensors"))
        except Exception as error:
            reasons = [result["reason"], f"speed: {(str(error).strip() or repr(error)).splitlines()[0]}"]
            result |= {"status": "failed", "reason": "; ".join(filter(None, reasons))}
    return measure_speed(models, held_out.begun, settings, folder / SPEED, course)
