"""Score multiple choice, minimal pairs and last words from a local .jsonl file by log-likelihood.

Each line holds one item, in one of these forms:

    {"prompt": "The sky is", "choices": ["blue", "a fish"], "answer": 0}
    {"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps."}
    {"context": "She looked at the", "continuation": "sky"}
    {"sentence": "The cup fell since _ was wet.", "option1": "it", "option2": "he", "answer": "1"}

The names of ARC, HellaSwag and PIQA are read as well: `query`, `ctx` or `question` for `prompt`, `endings` for
`choices`, and `gold` or `label` for `answer`. The last form is that of Winogrande: what stands after the blank is
scored after each of the options.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError, on_one_line
from ..sources.structured import as_text, parse_json, shown
from .likelihood import encode_pair, log_likelihoods

_NAMES = {
    "prompt": ("prompt", "query", "ctx", "question"),
    "choices": ("choices", "endings"),
    "answer": ("answer", "gold", "label"),
}
_BLANK = "_"


@dataclass(frozen=True)
class Item:
    """Hold one question: which of `choices` follows `prompt`?

    Attributes:
        prompt: the text before each choice, empty for a minimal pair; or one text for each choice.
        choices: the continuations; a single one asks whether the model would write that continuation word for word.
        answer: index of the right choice.
    """

    prompt: str | tuple[str, ...]
    choices: tuple[str, ...]
    answer: int

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Return each choice after its prompt."""
        prompts = (self.prompt,) * len(self.choices) if isinstance(self.prompt, str) else self.prompt
        return list(zip(prompts, self.choices, strict=True))


def read_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Return the first `limit` items of a .jsonl file; all items where `limit` is None.

    Raises:
        UsageError: the file does not exist or is empty, or a line is no item; the message gives the number of the line.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"task file {str(path)!r} does not exist")
    items: list[Item] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(items) >= limit:
                break
            if not line.strip():
                continue
            try:
                items.append(_item(parse_json(line)))
            except ValueError as error:
                raise UsageError(f"{str(path)!r}, line {number}, is no item: {error}") from None
    if not items:
        raise UsageError(f"task file {str(path)!r} is empty")
    return items


def _item(row: Any) -> Item:
    """Return the item of a line; ValueError with key, value and what was expected."""
    if not isinstance(row, dict):
        raise ValueError(f"it is {shown(row)}; expected an object")
    if "sentence_good" in row:
        return Item("", (_text(row, "sentence_good"), _text(row, "sentence_bad")), 0)
    if "continuation" in row:
        return Item(_text(row, "context", empty=True), (_text(row, "continuation"),), 0)
    if "option1" in row:
        return _winogrande(row)
    keys = {}
    for name, known in _NAMES.items():
        key = next((key for key in known if key in row), None)
        if key is None:
            raise ValueError(f"it has no {name}; it has {on_one_line(', '.join(row))}")
        keys[name] = key
    choices, answer = row[keys["choices"]], _index(row, keys["answer"])
    if not isinstance(choices, list):
        raise ValueError(f"{keys['choices']} is {shown(choices)}; expected a list of texts")
    if len(choices) < 2 or not all(isinstance(c, str) and c for c in choices) or not 0 <= answer < len(choices):
        raise ValueError(f"{len(choices)} choices with answer {answer!r}; expected texts, and the index of one")
    for choice in choices:
        as_text(choice)
    return Item(_text(row, keys["prompt"], empty=True), tuple(choices), answer)


def _winogrande(row: dict[str, Any]) -> Item:
    """Return an item of Winogrande, to be scored as by lm-eval: the options end the prompts, the rest is the choice."""
    sentence, answer = _text(row, "sentence"), _index(row, "answer")
    before, blank, after = sentence.partition(_BLANK)
    if not blank or _BLANK in after or not after.strip():
        raise ValueError(f"sentence is {shown(sentence)}; expected one {_BLANK} for the option, and words after it")
    if answer not in (1, 2):
        raise ValueError(f"answer is {shown(row['answer'])}; expected 1 or 2, the number of the option")
    prompts = tuple(before + _text(row, option) for option in ("option1", "option2"))
    return Item(prompts, (after.strip(),) * 2, answer - 1)


def _text(row: dict[str, Any], key: str, empty: bool = False) -> str:
    try:
        value = as_text(row.get(key))
    except ValueError as error:
        raise ValueError(f"{key} is {error}") from None
    if not value and not empty:
        raise ValueError(f"{key} is empty; expected a text")
    return value


def _index(row: dict[str, Any], key: str) -> int:
    """Return a whole number, which some files write as a text."""
    value = row.get(key)
    if type(value) is str and value.isdecimal():
        value = int(value[:9])
    if type(value) is not int:
        raise ValueError(f"{key} is {shown(value)}; expected a whole number")
    return value


@dataclass(frozen=True)
class Scores:
    """Hold the scores of items, one entry per item in each list.

    Attributes:
        acc: 1.0 where the choice with the highest log-likelihood is the answer, else 0.0. For single choices, 1.0 where
            each token of the choice is the most likely one.
        acc_norm: as `acc`, by log-likelihood per character of the choice, as in lm-eval; empty for single choices, and
            where the choices of every item are one text after different prompts.
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
    requests = [encode_pair(tokenizer, prompt, f" {choice}") for item in items for prompt, choice in item.pairs]
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
    differ = any(len(set(item.choices)) > 1 for item in items)
    return Scores(acc, acc_norm if differ else [], [])
