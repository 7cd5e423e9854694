"""Run tasks of lm-eval (extra `eval`), which scores a swapped model like any other transformers model.

lm-eval pads on the right where it scores and on the left where it generates. The numbers of lm-eval differ from those
of this package on the same text only where lm-eval defines something else:

- `loglikelihood_rolling` (WikiText) puts the token that starts a text first, and predicts the whole text from windows
  of the model's full length that share one token. lm-eval thus computes `sliding_perplexity` with
  `stride = context - 1` on a text that starts with that token, less the last tokens that fill no stride. Where the
  tokenizer itself writes the start token, the text starts with two start tokens. lm-eval counts words in the raw text,
  empty ones at the ends of the text included.
- lm-eval cuts the start off a prompt that is too long; this package refuses such a prompt.
- The standard error of a metric that is no mean comes from 1,000 resamples here and from 100,000 in lm-eval.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..sources.blocks import start_tokens
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
    """Run tasks of lm-eval and return every metric of each task.

    Args:
        names: names of tasks, groups or tags; a group or tag gives several tasks.
        limit: items per task, the first ones; None for all.
        include_path: a folder of task files (yaml), searched before the tasks of lm-eval.
        batch_size: batch size of the forward passes of lm-eval.
        seed: seed of Python's, numpy's and torch's generators and of the few-shot examples.

    Raises:
        UsageError: lm-eval does not know one of the names.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=include_path)  # which reads its thousands of files
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise unknown_task(unknown[0], ", but lm-eval has no task of this name (`lm-eval ls tasks`, --include_path)")
    tasks = manager.load(list(names))["tasks"]
    found = simple_evaluate(
        _wrapped(model, tokenizer, batch_size), tasks=list(tasks.values()), limit=limit, task_manager=manager,
        bootstrap_iters=0, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip
    return [result for name, samples in found["samples"].items() for result in _results(name, tasks[name], samples)]


def _wrapped(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """Return the model as lm-eval takes it, also where its tokenizer has no token that ends a text or pads one."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        def tok_decode(self, tokens, skip_special_tokens=True):
            # It asks what ends a text, to stop there: nothing, where the tokenizer has no such token.
            return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)

    tokenizer = copy.deepcopy(tokenizer)  # lm-eval changes it
    first = None
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        # Of a text with nothing before it lm-eval needs something to stand first.
        first = (start_tokens(tokenizer) or tokenizer("\n", add_special_tokens=False).input_ids or [0])[0]
    if all(getattr(tokenizer, f"{name}_token_id") is None for name in ("pad", "unk", "eos")):
        # Any token of the model will do, since it is masked; lm-eval would add one that the model does not know.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return Model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, prefix_token_id=first)


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
