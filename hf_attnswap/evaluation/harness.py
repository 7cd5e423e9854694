"""Tasks of lm-eval (extra `eval`), scored by lm-eval itself; a swapped model is a transformers model to it.

lm-eval pads on the right where it scores and on the left where it generates. Its numbers differ from ours on the same
text only where it defines something else:

- `loglikelihood_rolling` (WikiText) puts the token that starts a text first, and predicts the whole text from windows
  of the model's full length that share one token: `sliding_perplexity` with `stride = context - 1` on a text that
  starts with that token, less the last tokens that fill no stride. A tokenizer that writes the token itself writes
  it a second time there. Words are counted in the raw text, empty ones at its ends included.
- A prompt that is too long loses its start; ours are refused.
- The error of a metric that is no mean comes from 1,000 resamples here and from 100,000 there.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .result import Result, mean
from .tasks.registry import unknown as unknown_task


def harness_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    limit: int | None = None,
    include_path: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Result]:
    """Every metric of every task that `names` stand for (groups and tags give several).

    Args:
        limit: items per task, the first ones. include_path: a folder of task files (yaml), searched first.

    Raises:
        UsageError: a name that lm-eval does not know.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=include_path)  # which reads its thousands of files
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise unknown_task(unknown[0], ", but lm-eval has no task of this name (`lm-eval ls tasks`, --include_path)")
    tasks = manager.load(list(names))["tasks"]
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=list(tasks.values()), limit=limit,
        task_manager=manager, bootstrap_iters=0, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
        fewshot_random_seed=seed,
    )  # fmt: skip
    return [result for name, samples in found["samples"].items() for result in _results(name, tasks[name], samples)]


def _results(name: str, task: Any, samples: list[dict[str, Any]]) -> Iterable[Result]:
    better, aggregation = task.higher_is_better(), task.aggregation()
    filters = sorted({sample["filter"] for sample in samples})
    for metric in dict.fromkeys(metric for sample in samples for metric in sample["metrics"]):
        for filter_name in filters:
            own = [s for s in samples if s["filter"] == filter_name and metric in s["metrics"]]
            scores = tuple(sample[metric] for sample in sorted(own, key=lambda sample: sample["doc_id"]))
            aggregate = aggregation.get(metric)
            if aggregate is None or aggregate.__name__ == "mean":
                scores, aggregate = tuple(map(float, scores)), mean
            label = metric if len(filters) == 1 else f"{metric},{filter_name}"
            yield Result(name, label, scores, better.get(metric, True) is not False, aggregate)
