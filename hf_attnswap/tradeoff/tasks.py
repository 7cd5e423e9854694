"""What likelihood hides: tasks of an arm, and what it writes by itself beside what softmax writes.

Of every metric its value for each of a fixed set of resamples of the items is kept. They are the same items for all
arms, so the difference of two arms in each resample gives the interval of a paired bootstrap, for any metric.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.generating import agreement, continuations
from ..evaluation.result import Result
from ..evaluation.tasks import check_tasks, run_tasks
from ..sources.files import write_whole
from ..statistics import resampled
from .arms import Settings

WRITING = "writing"  # a task of ours, beside those of `evaluation.tasks`
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 64
RESAMPLES = 1000


def check(names: Sequence[str]) -> None:
    """UsageError for a task that cannot be run here."""
    check_tasks([name for name in names if name != WRITING])


def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    settings: Settings,
    written: Tensor | None,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A dict per metric: task, metric, value, standard error, items, and its value for each resample.

    Args:
        tokens: the text that `writing` goes on from. written: what softmax writes there; None without `writing`.
    """
    names = [name for name in settings.tasks if name != WRITING]
    results = run_tasks(
        model, tokenizer, names, lengths=settings.context_lengths, limit=settings.task_limit,
        include_path=settings.include_path, seed=settings.seed, progress=progress,
    )  # fmt: skip
    if written is not None:
        progress(WRITING)
        found = agreement(model, prompts(tokens), written)
        results += [
            Result(WRITING, "tokens as softmax's", tuple(found.same)),
            Result(WRITING, "agreement when told softmax's", tuple(found.told)),
            Result(WRITING, "repetition", tuple(found.repetition), higher_is_better=False),
        ]
    return [_described(result) for result in results]


def prompts(tokens: Tensor) -> Tensor:
    """The starts that are continued, `[N, PROMPT_TOKENS]`."""
    stream = tokens.reshape(-1)[: PROMPTS * PROMPT_TOKENS]
    return stream[: len(stream) // PROMPT_TOKENS * PROMPT_TOKENS].view(-1, PROMPT_TOKENS)


def written_by(model: PreTrainedModel, tokens: Tensor, path: Path) -> Tensor:
    """What `model` writes after the prompts, greedily, `[N, NEW_TOKENS]`; kept in the file `path`."""
    if not path.is_file():
        write_whole(path, json.dumps(continuations(model, prompts(tokens), NEW_TOKENS).tolist()).encode())
    return torch.tensor(json.loads(path.read_text()))


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
