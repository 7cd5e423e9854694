"""Run the tasks on each arm, which show what likelihood hides.

For each metric the value on each of a fixed set of resamples of the items is kept. All arms have the same resamples, so
the differences of two arms give the interval of a paired bootstrap, for any metric.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.result import Result
from ..evaluation.tasks import TaskInputs, answers_of, run_tasks
from ..sources.files import write_whole
from ..statistics import resampled
from .arms import Settings

RESAMPLES = 1000


def measure_tasks(
    model: PreTrainedModel,
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    settings: Settings,
    path: Path,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run the tasks on an arm and return one dict per metric.

    Args:
        original: the model with softmax, whose answers the tasks compare with.
        tokens: held-out text, int64.
        path: the JSON file that keeps the answers of the original for all arms; written by the first arm.
        progress: called with a line of text for each part of the work.

    Returns:
        Dicts of `task`, `metric`, `higher_is_better`, `value`, `standard_error` (None for a single item), `items`
        (their number) and `resampled` (the value on each of `RESAMPLES` resamples).
    """
    inputs = TaskInputs(settings.context_lengths, settings.task_limit, seed=settings.seed, tokens=tokens)
    if not path.is_file():
        progress("answers of softmax to the tasks")
        write_whole(path, json.dumps(answers_of(original, tokenizer, settings.tasks, inputs)).encode())
    answers = json.loads(path.read_text())
    results = run_tasks(
        model, tokenizer, settings.tasks, inputs, answers=answers, include_path=settings.include_path,
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
