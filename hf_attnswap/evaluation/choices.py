"""Score multiple choice, minimal pairs and last words from a local .jsonl file by log-likelihood.

Each line holds one item, in one of these forms:

    {"prompt": "The sky is", "choices": ["blue", "a fish"], "answer": 0}
    {"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps."}
    {"context": "She looked at the", "continuation": "sky"}

The names of ARC, HellaSwag and PIQA are read as well: `query`, `ctx` or `question` for `prompt`, `endings` for
`choices`, and `gold` or `label` for `answer`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from .likelihood import encode_pair, log_likelihoods

_NAMES = {
    "prompt": ("prompt", "query", "ctx", "question"),
    "choices": ("choices", "endings"),
    "answer": ("answer", "gold", "label"),
}


@dataclass(frozen=True)
class Item:
    """Hold one question: which of `choices` follows `prompt`?

    Attributes:
        prompt: the text before each choice; empty for a minimal pair.
        choices: the continuations; a single one asks whether the model would write that continuation word for word.
        answer: index of the right choice.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Return the first `limit` items of a .jsonl file; all items where `limit` is None.

    Raises:
        UsageError: the file does not exist or is empty, or a line is no item; the message gives the number of the line.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"task file {str(path)!r} does not exist")
    items: list[Item] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(items) >= limit:
                break
            if not line.strip():
                continue
            try:
                items.append(_item(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = "not JSON" if isinstance(error, json.JSONDecodeError) else str(error) or repr(error)
                raise UsageError(f"{str(path)!r}, line {number}, is no item: {reason}") from error
    if not items:
        raise UsageError(f"task file {str(path)!r} is empty")
    return items


def _item(row: dict[str, Any]) -> Item:
    if "sentence_good" in row:
        return Item("", (row["sentence_good"], row["sentence_bad"]), 0)
    if "continuation" in row:
        return Item(row["context"], (row["continuation"],), 0)
    given = {}
    for name, known in _NAMES.items():
        key = next((key for key in known if key in row), None)
        if key is None:
            raise ValueError(f"it has no {name}; it has {', '.join(row)}")
        given[name] = row[key]
    choices, answer = tuple(given["choices"]), int(given["answer"])
    if len(choices) < 2 or not all(isinstance(c, str) and c for c in choices) or not 0 <= answer < len(choices):
        raise ValueError(
            f"{len(choices)} choices with answer {given['answer']!r}; expected texts, and the index of one"
        )
    return Item(given["prompt"], choices, answer)


@dataclass(frozen=True)
class Scores:
    """Hold the scores of items, one entry per item in each list.

    Attributes:
        acc: 1.0 where the choice with the highest log-likelihood is the answer, else 0.0. For single choices, 1.0 where
            each token of the choice is the most likely one.
        acc_norm: as `acc`, by log-likelihood per character of the choice, as in lm-eval; empty for single choices.
        log_likelihood: log-likelihood of single choices, in nats; empty for several choices.
    """

    acc: list[float]
    acc_norm: list[float]
    log_likelihood: list[float]


def score_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Return the scores of `items`, computed as lm-eval's `multiple_choice` does, with a space before each choice.

    The first of equally likely choices wins. A single choice is right where each of its tokens is the most likely one,
    as in lm-eval's `lambada`.

    Args:
        batch_size: choices per forward pass.
        progress: called with the number of choices scored since the last call.

    Raises:
        UsageError: an item is longer than the positions of the model, or some items have a single choice and others
            several.
    """
    single = len(items[0].choices) == 1
    if any((len(item.choices) == 1) != single for item in items):
        raise UsageError("some items have a single choice and others have several: put them in two files")
    requests = [encode_pair(tokenizer, item.prompt, f" {choice}") for item in items for choice in item.choices]
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(r.prompt) + len(r.target) for r in requests)
    if limit and longest > limit + 1:
        raise UsageError(f"an item has {longest} tokens, and the model takes {limit}")
    found = iter(log_likelihoods(model, requests, batch_size, progress))
    if single:
        own = [next(found) for _ in items]
        return Scores([float(x.greedy) for x in own], [], [x.value for x in own])
    acc, acc_norm = [], []
    for item in items:
        values = [next(found).value for _ in item.choices]
        per_character = [x / len(choice) for x, choice in zip(values, item.choices, strict=True)]
        acc.append(float(values.index(max(values)) == item.answer))
        acc_norm.append(float(per_character.index(max(per_character)) == item.answer))
    return Scores(acc, acc_norm, [])
