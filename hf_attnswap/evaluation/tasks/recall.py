"""Test multi-query associative recall: a text of keys with their values, and then some of the keys again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...errors import UsageError
from ...integration.objectives import input_device
from ...sources.blocks import start_tokens
from ..result import Result
from .base import Task
from .registry import register


@register
@dataclass(frozen=True)
class RecallTask(Task):
    """Ask for `length / 8` values per text, at most 32; a small vocabulary makes shorter texts.

    Attributes:
        texts: texts per length where `TaskInputs.limit` is None.
    """

    name = "recall"
    measures = "How many of the values that were paired with random words the model says when it sees the words again."
    texts: int = 16

    def run(self, model, tokenizer, inputs, control=None) -> list[Result]:
        words, start, results = word_tokens(tokenizer), start_tokens(tokenizer), []
        for length in inputs.lengths:
            room = length - len(start)
            queries = min(32, length // 8)
            pairs = min(room // 2 - queries, len(words) // 2)
            if pairs < 1:
                raise UsageError(
                    f"recall at {length} tokens: a text needs room for a pair, and the tokenizer two tokens that are "
                    f"words with a space before them; it has {len(words)}. Leave recall out, or give longer contexts"
                )
            try:
                items = recalls(words, pairs, min(queries, pairs), inputs.limit or self.texts, inputs.seed, start)
            except ValueError as error:
                raise UsageError(f"recall at {length} tokens: {error}") from error
            label = f"recall of {items.pairs} pairs in {items.length} tokens"
            results.append(Result(label, "recalled", tuple(recalled(model, items))))
        return results


@dataclass(frozen=True)
class Recall:
    """Hold texts of random tokens: pairs of a key and its value, and then some of the pairs again.

    Attributes:
        tokens: int64 `[N, length]`.
        asked: bool `[N, length]`, True at the keys that come again; the token after such a key is its value.
        pairs: different pairs per text.
    """

    tokens: Tensor
    asked: Tensor
    pairs: int

    @property
    def length(self) -> int:
        """Return the number of tokens of each text."""
        return self.tokens.shape[1]


def recalls(
    vocabulary: Tensor, pairs: int, queries: int, texts: int = 8, seed: int = 0, start: Sequence[int] = ()
) -> Recall:
    """Draw texts `k1 v1 k2 v2 ...`, followed by `queries` of the pairs again in another order.

    A text has `2 (pairs + queries)` tokens after `start`. A model that copies by induction knows every value that is
    asked for (Arora et al., "Zoology", 2023).

    Args:
        vocabulary: the token ids to draw from, int64, at least `2 pairs`; all keys and values of a text are different.
        pairs: different pairs per text.
        queries: pairs that come again, at most `pairs`.
        texts: number of texts.
        start: what begins every text, see `sources.blocks.start_tokens`.

    Raises:
        ValueError: there are too few tokens to draw from, or more queries than pairs.
    """
    if len(vocabulary) < 2 * pairs or queries > pairs:
        raise ValueError(
            f"{pairs} pairs and {queries} queries need {2 * pairs} tokens to draw from, not {len(vocabulary)}, and no "
            "more queries than pairs"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(texts):
        drawn = vocabulary[torch.randperm(len(vocabulary), generator=generator)[: 2 * pairs]].view(pairs, 2)
        again = drawn[torch.randperm(pairs, generator=generator)[:queries]]
        rows.append(torch.cat([torch.tensor(start, dtype=drawn.dtype), drawn.flatten(), again.flatten()]))
    tokens = torch.stack(rows)
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    asked[:, len(start) + 2 * pairs :: 2] = True
    return Recall(tokens, asked, pairs)


@torch.no_grad()
def recalled(model: nn.Module, task: Recall, progress: Callable[[int], None] | None = None) -> list[float]:
    """Return for each text the share of the values asked for that the model predicts as the most likely next token.

    Args:
        progress: called with 1 after each text.
    """
    device, shares = input_device(model), []
    for tokens, asked in zip(task.tokens, task.asked, strict=True):
        said = model(input_ids=tokens[None].to(device), use_cache=False).logits[0].argmax(-1).cpu()
        right = said[:-1][asked[:-1]] == tokens[1:][asked[:-1]]
        shares.append(right.double().mean().item())
        if progress is not None:
            progress(1)
    return shares


def word_tokens(tokenizer: PreTrainedTokenizerBase, most: int = 4096) -> Tensor:
    """Return the ids of the first tokens that are a word of two or more ASCII letters with a space before it.

    Args:
        most: the most ids that are returned.

    Returns:
        int64 `[words]`, ascending.
    """
    ids = [
        index
        for piece, index in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        if piece[:1] in ("Ġ", "▁") and piece[1:].isascii() and piece[1:].isalpha() and len(piece) > 2
    ]
    return torch.tensor(ids[:most], dtype=torch.long)
