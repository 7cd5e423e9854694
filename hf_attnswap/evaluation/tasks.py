"""Tasks by name: generated ones, local .jsonl files, and those of lm-eval (extra `eval`); scores by item, to pair."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from math import ceil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from .choices import read_items, score_choices
from .harness import harness_tasks
from .result import Result, perplexity
from .retrieval import found_needles, needles, recalled, recalls, word_tokens

GENERATED = ("needle", "recall")
Progress = Callable[[str], None]


def check_tasks(names: Sequence[str]) -> None:
    """UsageError where a task is a file that is not there, or one of lm-eval's and that is not installed."""
    for name in names:
        if name.endswith(".jsonl"):
            read_items(name, 1)
        elif name not in GENERATED and find_spec("lm_eval") is None:
            raise UsageError(
                f"task {name!r} is neither {' nor '.join(GENERATED)} nor a .jsonl file, and lm-eval is not installed: "
                'pip install "hf_attnswap[eval]"'
            )


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    lengths: Sequence[int] = (512,),
    limit: int | None = None,
    include_path: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress = lambda line: None,
) -> list[Result]:
    """Run tasks on a model, swapped or not.

    Args:
        names: `needle`, `recall`, paths of .jsonl files (see `choices`), or tasks of lm-eval.
        lengths: tokens of the texts of `needle` and `recall`.
        limit: items per task, the first ones; texts per length for `needle` (20 unless given) and `recall` (16).
        include_path: a folder of task files (yaml) for lm-eval.

    Raises:
        UsageError: an unknown task, or one that does not fit the model.
    """
    check_tasks(names)
    results: list[Result] = []
    others = [name for name in names if name not in GENERATED and not name.endswith(".jsonl")]
    for name in (name for name in names if name not in others):
        progress(name)
        if name == "needle":
            results += _needle(model, tokenizer, lengths, limit or 20, seed)
        elif name == "recall":
            results += _recall(model, tokenizer, lengths, limit or 16, seed)
        else:
            items = read_items(name, limit)
            scores = score_choices(model, tokenizer, items, batch_size)
            results.append(Result(Path(name).stem, "acc", tuple(scores.acc)))
            if scores.acc_norm:
                results.append(Result(Path(name).stem, "acc_norm", tuple(scores.acc_norm)))
            if scores.log_likelihood:
                told = tuple(scores.log_likelihood)
                results.append(Result(Path(name).stem, "perplexity", told, False, perplexity))
    if others:
        progress(", ".join(others))
        results += harness_tasks(model, tokenizer, others, limit, include_path, batch_size, seed)
    return results


def _needle(model, tokenizer, lengths, texts: int, seed: int) -> list[Result]:
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    try:
        return [
            Result(f"needle at {length}", "found", tuple(map(float, found_needles(model, items))))
            for length in lengths
            for items in [needles(tokenizer, [length], depths, ceil(texts / len(depths)), seed)[:texts]]
        ]
    except ValueError as error:
        raise UsageError(str(error)) from error


def _recall(model, tokenizer, lengths, texts: int, seed: int) -> list[Result]:
    words, results = word_tokens(tokenizer), []
    for length in lengths:
        queries = min(32, length // 8)
        pairs = min(length // 2 - queries, len(words) // 2)  # a small vocabulary makes shorter texts
        try:
            task = recalls(words, pairs, min(queries, pairs), texts, seed)
        except ValueError as error:
            raise UsageError(f"recall at {length} tokens: {error}") from error
        results.append(
            Result(f"recall of {task.pairs} pairs in {task.length} tokens", "recalled", tuple(recalled(model, task)))
        )
    return results
