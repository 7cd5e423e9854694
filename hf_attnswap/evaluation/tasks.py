"""Tasks by name: generated ones, local .jsonl files, and those of lm-eval (extra `eval`); scores by item, to pair."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from .choices import read_items, score_choices
from .paired import FEW, paired_bootstrap
from .retrieval import found_needles, needles, recalled, recalls, word_tokens

GENERATED = ("needle", "recall")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """One metric of one task; `scores` has a number per item, in the order of the items."""

    task: str
    metric: str
    scores: tuple[float, ...]
    higher_is_better: bool = True

    @property
    def value(self) -> float:
        return math.fsum(self.scores) / len(self.scores)

    @property
    def standard_error(self) -> float:
        """From the spread between items; NaN for a single one."""
        n = len(self.scores)
        if n < 2:
            return math.nan
        return math.sqrt(math.fsum((x - self.value) ** 2 for x in self.scores) / (n - 1) / n)

    def row(self, control: "Result | None" = None) -> dict[str, Any]:
        """As plain data, with the paired difference to the control on the same items."""
        error = self.standard_error
        row = {
            "task": self.task,
            "metric": self.metric,
            "value": self.value,
            "standard_error": None if math.isnan(error) else error,
            "items": len(self.scores),
            "few": len(self.scores) < FEW,
        }
        if control is None:
            return row
        found = paired_bootstrap(self.scores, control.scores)
        bounds = {"value": found.value, "low": found.low, "high": found.high, "few": found.few}
        verdict = found.verdict(lower_is_better=not self.higher_is_better)
        return row | {"control": control.value, "difference": bounds, "verdict": verdict}


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
        limit: items per task, the first ones; per length and depth for `needle` (4 unless given), texts per length for
            `recall` (16).
        include_path: a folder of task files (yaml) for lm-eval.

    Raises:
        UsageError: an unknown task, or one that does not fit the model.
    """
    check_tasks(names)
    results: list[Result] = []
    for name in names:
        progress(name)
        if name == "needle":
            results += _needle(model, tokenizer, lengths, limit or 4, seed)
        elif name == "recall":
            results += _recall(model, tokenizer, lengths, limit or 16, seed)
        elif name.endswith(".jsonl"):
            items = read_items(name, limit)
            scores = score_choices(model, tokenizer, items, batch_size)
            results.append(Result(Path(name).stem, "acc", tuple(scores.acc)))
            if len(items[0].choices) > 1:
                results.append(Result(Path(name).stem, "acc_norm", tuple(scores.acc_norm)))
    others = [name for name in names if name not in GENERATED and not name.endswith(".jsonl")]
    if others:
        progress(", ".join(others))
        results += _lm_eval(model, tokenizer, others, limit, include_path, batch_size, seed)
    return results


def _needle(model, tokenizer, lengths, repeats: int, seed: int) -> list[Result]:
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    try:
        return [
            Result(f"needle at {length}", "found", tuple(map(float, found_needles(model, items))))
            for length in lengths
            for items in [needles(tokenizer, [length], depths, repeats, seed)]
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


def _lm_eval(model, tokenizer, names, limit, include_path, batch_size, seed) -> list[Result]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=include_path)  # which reads its thousands of files
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(
            f"lm-eval has no task {unknown[0]!r}: see `lm-eval ls tasks`, or name a folder: --include_path"
        )
    # lm-eval pads on the left where it generates, and on the right where it scores.
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        wrapped, tasks=list(names), limit=limit, task_manager=manager, bootstrap_iters=0,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip
    results = []
    for task, samples in found["samples"].items():
        better = found["higher_is_better"].get(task, {})
        filters = {sample["filter"] for sample in samples}
        for metric in samples[0]["metrics"]:
            for name in sorted(filters):
                own = sorted((s for s in samples if s["filter"] == name), key=lambda s: s["doc_id"])
                scores = [s[metric] for s in own]
                if all(isinstance(x, int | float) for x in scores):  # others are aggregated otherwise
                    label = metric if len(filters) == 1 else f"{metric},{name}"
                    results.append(
                        Result(task, label, tuple(map(float, scores)), better.get(metric, True) is not False)
                    )
    return results
