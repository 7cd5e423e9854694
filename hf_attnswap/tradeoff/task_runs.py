"""Run the tasks on each arm, which show what likelihood hides.

For each metric the value on each of a fixed set of resamples of the items is kept. All arms have the same resamples, so
the differences of two arms give the interval of a paired bootstrap, for any metric.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.result import Result
from ..evaluation.tasks import TaskInputs, answers_of, run_tasks
from ..sources.files import write_whole
from ..sources.structured import read_json
from ..statistics import resampled
from .arms import Settings
from .held_out import HeldOut

RESAMPLES = 1000


def measure_tasks(
    model: PreTrainedModel,
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Sequence[str],
    held_out: HeldOut,
    settings: Settings,
    path: Path,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run tasks on an arm and return one dict per metric.

    Args:
        original: the model with softmax, whose answers the tasks compare with.
        chosen: those of the tasks of the settings that are run.
        held_out: the text that tasks read.
        path: the JSON file that keeps the answers of the original for all arms; written by the first arm.
        progress: called with a line of text for each part of the work.

    Returns:
        Dicts of `task`, `metric`, `higher_is_better`, `value`, `standard_error` (None for a single item), `items`
        (their number) and `resampled` (the value on each of `RESAMPLES` resamples).
    """
    inputs = TaskInputs(
        settings.task_lengths or settings.context_lengths, settings.task_limit, seed=settings.seed,
        tokens=held_out.tokens, texts=held_out.texts,
    )  # fmt: skip
    answers = read_json(path) if path.is_file() else {}
    if not set(chosen) <= set(answers):
        progress("answers of softmax to the tasks")
        told = answers_of(original, tokenizer, chosen, inputs)
        answers |= {name: told.get(name) for name in chosen}
        write_whole(path, json.dumps(answers).encode())
    results = run_tasks(
        model, tokenizer, chosen, inputs, answers=answers, include_path=settings.include_path,
        progress=progress,
    )  # fmt: skip
    return [_described(result) for result in results]


def _described(result: Result) -> dict[str, Any]:
    error = result.standard_error
    return {
        "task": result.task,
        "metric": result.metric,
        "higher_is_better": result.higher_is_better,
        "value": result.value,
        "standard_error": None if math.isnan(error) else error,
        "items": len(result.scores),
        "resampled": resampled(result.scores, result.aggregate, RESAMPLES).tolist(),
    }
