"""Run tasks by name from three sources: generated tasks, local .jsonl files, and tasks of lm-eval (extra `eval`)."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import UsageError
from ...integration.objectives import Objective, objective
from ..choices import read_items, score_choices
from ..result import Result, perplexity
from .base import Task, TaskInputs
from .registry import get, names, unknown

Progress = Callable[[str], None]

# What likelihood hides of a swap: reports measure it beside perplexity unless they are told otherwise.
RETRIEVAL = ("needle", "copy")
RETRIEVAL_LENGTHS = (512, 1024, 2048, 4096, 8192)


def check_tasks(chosen: Sequence[str], has_text: bool = True, predicts: Objective | None = None) -> None:
    """Check that the chosen tasks can run, without running them.

    A name that only lm-eval can know is looked up when the task runs, where lm-eval is installed.

    Args:
        chosen: names of generated tasks, paths of .jsonl files, or tasks of lm-eval.
        has_text: whether a held-out text is given.
        predicts: what the model makes of its input (`integration.objectives.objective`), where that is known.

    Raises:
        UsageError: a file does not exist or holds no item, a name is unknown and lm-eval is not installed, a task needs
            a text and none is given, or a task is for other models.
    """
    for name in chosen:
        fits = get(name).objectives if name in names() else ("next tokens",)
        if predicts is not None and predicts not in fits:
            own = _QUALITY.get(predicts)
            advice = f"; use --tasks {own}" if own else ""
            raise UsageError(f"task {name!r} is for models of {' or '.join(fits)}, not of {predicts}{advice}")
        if name.endswith(".jsonl"):
            read_items(name, 1)
        elif name in names():
            if (get(name).text_tokens or get(name).separate_texts) and not has_text:
                raise UsageError(f"task {name!r} goes on from a text: give one by --validation_file or --dataset_name")
        elif find_spec("lm_eval") is None:
            raise unknown(name, ', and lm-eval is not installed: pip install "hf_attnswap[eval]"')


_QUALITY: dict[str, str] = {"masked tokens": "masked", "labels": "likeness", "vectors": "likeness"}
_LIKENESS = "hf_attnswap.evaluation.likeness.likeness(model, original, inputs)"
_ELSEWHERE = {
    "another text": f"writes another text than it reads: compare its logits by {_LIKENESS}",
    "images": f"reads images: compare it with the original by {_LIKENESS} on what its processor makes of images",
    "speech": f"reads sound: compare it with the original by {_LIKENESS} on what its processor makes of sound, and "
    "what it writes by hf_attnswap.evaluation.speech.word_errors(texts, texts_of_the_original)",
    "several inputs": f"reads several inputs at once: compare it with the original by {_LIKENESS}",
}


def quality_task(model: PreTrainedModel) -> str | None:
    """Return the name of the task that measures a model which has no perplexity; None for models of next tokens.

    Raises:
        UsageError: the model reads something else than one text; the message says what measures it.
    """
    predicts = objective(model)
    if predicts in _ELSEWHERE:
        raise UsageError(f"{type(model).__name__} {_ELSEWHERE[predicts]}")
    return _QUALITY.get(predicts)


def retrieval_lengths(model: PreTrainedModel, longest: int = RETRIEVAL_LENGTHS[-1]) -> tuple[int, ...]:
    """Return at which of `RETRIEVAL_LENGTHS` retrieval is measured: as far as the positions of the model go.

    Args:
        longest: the longest text of the comparison, tokens; longer ones are left out too.
    """
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    most = min(longest, positions) if isinstance(positions, int) else longest
    return tuple(length for length in RETRIEVAL_LENGTHS if length <= most)


def apart(chosen: Sequence[str]) -> list[list[str]]:
    """Return the chosen tasks in groups that can run apart: each by itself, but those of lm-eval together, at the end.

    lm-eval reads its thousands of files each time.
    """
    others = [name for name in chosen if name not in names() and not name.endswith(".jsonl")]
    return [[name] for name in chosen if name not in others] + ([others] if others else [])


def separate_texts(chosen: Sequence[str], limit: int | None = None) -> int:
    """Return how many texts by themselves, `TaskInputs.texts`, the chosen tasks read; 0 where none of them does.

    Args:
        limit: the most items per task; None leaves the number to the task.
    """
    return max((task.separate_texts and (limit or task.separate_texts) for task in _generated(chosen)), default=0)


def text_tokens(chosen: Sequence[str]) -> int:
    """Return how many tokens of held-out text the chosen tasks need; 0 where none of the tasks reads a text."""
    return max((task.text_tokens for task in _generated(chosen)), default=0)


def answers_of(
    control: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chosen: Sequence[str], inputs: TaskInputs
) -> dict[str, Any]:
    """Return by name, as JSON values, what tasks need to know of the control, for `run_tasks(answers=...)`."""
    answers = {task.name: task.answer(control, tokenizer, inputs) for task in _generated(chosen)}
    return {name: answer for name, answer in answers.items() if answer is not None}


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Sequence[str],
    inputs: TaskInputs,
    *,
    answers: Mapping[str, Any] | None = None,
    include_path: str | None = None,
    progress: Progress = lambda line: None,
) -> list[Result]:
    """Run tasks on a model, swapped or not, and return their metrics; those of lm-eval come last.

    Args:
        chosen: names of generated tasks (`names()`), paths of .jsonl files (see `choices`), or tasks of lm-eval.
        answers: what `answers_of` returns for the control; None where there is no control.
        include_path: a folder of task files (yaml) for lm-eval.
        progress: called with the name of each task before the task runs.

    Raises:
        UsageError: a task is unknown, or does not fit the model or the inputs.
    """
    check_tasks(chosen, inputs.tokens is not None, objective(model))
    results: list[Result] = []
    others = [name for name in chosen if name not in names() and not name.endswith(".jsonl")]
    for name in (name for name in chosen if name not in others):
        progress(name)
        if name.endswith(".jsonl"):
            results += _choices(model, tokenizer, name, inputs)
        else:
            results += get(name).run(model, tokenizer, inputs, (answers or {}).get(name))
    if others:
        from ..harness import harness_tasks

        progress(", ".join(others))
        results += harness_tasks(
            model, tokenizer, others, inputs.limit, include_path, inputs.batch_size, inputs.seed
        )  # fmt: skip
    return results


def _generated(chosen: Sequence[str]) -> list[Task]:
    return [get(name) for name in chosen if name in names()]


def _choices(model, tokenizer, path: str, inputs: TaskInputs) -> list[Result]:
    scores, task = score_choices(model, tokenizer, read_items(path, inputs.limit), inputs.batch_size), Path(path).stem
    results = [Result(task, "acc", tuple(scores.acc))]
    if scores.acc_norm:
        results.append(Result(task, "acc_norm", tuple(scores.acc_norm)))
    if scores.log_likelihood:
        results.append(Result(task, "perplexity", tuple(scores.log_likelihood), False, perplexity))
    return results
