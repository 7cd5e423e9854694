"""Ask for a number that stands somewhere in a long text: a needle in a haystack."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import ceil

from torch import nn
from transformers import PreTrainedTokenizerBase

from ...errors import UsageError
from ...sources.blocks import start_tokens
from ..likelihood import Request, encode_pair, log_likelihoods
from ..result import Result
from .base import Task
from .registry import register

BATCH_TOKENS = 8192  # that a model reads at once, at most, so that long texts fit into memory

_HAY = (
    "The grass is green. The sky is blue. The sun is warm. The road goes on. The river runs to the sea. "
    "The birds sing in the trees. The children play by the house. The old man reads his book. "
)
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
_QUESTION = "What is the pass key? The pass key is"


@register
@dataclass(frozen=True)
class NeedleTask(Task):
    """Hide a number in texts of each of the lengths, at each of the depths in turn.

    Attributes:
        texts: texts per length where `TaskInputs.limit` is None: with 100 a share is known to a tenth.
        depths: where the number is hidden, 0 (at the start) to 1 (at the question).
    """

    name = "needle"
    measures = "Whether the model says a number of five digits that stands somewhere in a long text."
    texts: int = 100
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)

    def run(self, model, tokenizer, inputs, control=None) -> list[Result]:
        texts, results = inputs.limit or self.texts, []
        for length in inputs.lengths:
            try:
                items = needles(tokenizer, [length], self.depths, ceil(texts / len(self.depths)), inputs.seed)[:texts]
            except ValueError as error:
                raise UsageError(str(error)) from error
            found = found_needles(model, items, max(1, min(inputs.batch_size, BATCH_TOKENS // length)))
            results.append(Result(f"needle at {length}", "found", tuple(map(float, found))))
        return results


@dataclass(frozen=True)
class Needle:
    """Hold one text with a number hidden in it.

    Attributes:
        length: tokens of the text, from what begins every text to the number at the end.
        depth: where the number is hidden, 0 (at the start) to 1 (at the question).
        request: the text as prompt, and the number as target; a token of mere space before it belongs to the prompt.
    """

    length: int
    depth: float
    request: Request


def needles(
    tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], depths: Sequence[float], repeats: int = 1, seed: int = 0
) -> list[Needle]:
    """Return `repeats` texts for every length and depth, each with another random number of five digits.

    Within a length the depths come in turn. The texts follow the passkey task of Mohtashami and Jaggi, "Landmark
    attention", 2023.

    Args:
        lengths: tokens of a text, from what begins every text to the number at the end.
        depths: where the number is hidden, 0 (at the start) to 1 (at the question).
        seed: seed of the numbers.

    Raises:
        ValueError: a length leaves no room for needle and question.
    """
    numbers = random.Random(seed)
    made = []
    for length in lengths:
        for _ in range(repeats):
            for depth in depths:
                made.append(
                    Needle(length, depth, _hide(tokenizer, str(numbers.randint(10_000, 99_999)), length, depth))
                )
    return made


def _hide(tokenizer, key: str, length: int, depth: float) -> Request:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    start, question = start_tokens(tokenizer), encode_pair(tokenizer, _QUESTION, f" {key}")
    # A space that is a token of its own is asked for no number: whether one follows or a word is often a near tie.
    spaces = sum(1 for _ in takewhile(lambda token: not tokenizer.decode([token]).strip(), question.target))
    asked = question.prompt[len(start) :] + question.target[:spaces]  # the text begins elsewhere
    number = question.target[spaces:]
    hay, needle = encode(_HAY), encode(_NEEDLE.format(key=key))
    room = length - len(start) - len(needle) - len(asked) - len(number)
    if room < 0:
        raise ValueError(f"a haystack of {length} tokens has no room for its needle: give at least {length - room}")
    before = round(room * depth)
    straw = (hay * (room // len(hay) + 1))[:room]
    return Request((*start, *straw[:before], *needle, *straw[before:], *asked), number)


def found_needles(model: nn.Module, items: Sequence[Needle], batch_size: int = 1) -> list[bool]:
    """Return for each item whether the model, decoding greedily, writes the number.

    The number counts where each of its tokens is the most likely one after the text and the tokens before.
    """
    return [found.greedy for found in log_likelihoods(model, [item.request for item in items], batch_size)]
