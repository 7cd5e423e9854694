"""Multi-query associative recall: many keys with their values, and then some of the keys again."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...errors import UsageError
from ..result import Result
from .base import Task
from .registry import register


@register
@dataclass(frozen=True)
class RecallTask(Task):
    """Ask for an eighth of the tokens of a text, at most 32 values; a small vocabulary makes shorter texts.

    Attributes:
        texts: texts per length, unless `TaskInputs.limit` says another number.
    """

    name = "recall"
    measures = "How many of the values that were paired with random words the model says when it sees the words again."
    texts: int = 16

    def run(self, model, tokenizer, inputs, control=None) -> list[Result]:
        words, results = word_tokens(tokenizer), []
        for length in inputs.lengths:
            queries = min(32, length // 8)
            pairs = min(length // 2 - queries, len(words) // 2)
            try:
                items = recalls(words, pairs, min(queries, pairs), inputs.limit or self.texts, inputs.seed)
            except ValueError as error:
                raise UsageError(f"recall at {length} tokens: {error}") from error
            label = f"recall of {items.pairs} pairs in {items.length} tokens"
            results.append(Result(label, "recalled", tuple(recalled(model, items))))
        return results


@dataclass(frozen=True)
class Recall:
    """Pairs of random tokens, a key and its value each, and then some of the keys again.

    Attributes:
        tokens: int64 `[N, length]`.
        asked: bool `[N, length]`, the keys that come again; what follows a key is its value.
    """

    tokens: Tensor
    asked: Tensor
    pairs: int

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


def recalls(vocabulary: Tensor, pairs: int, queries: int, texts: int = 8, seed: int = 0) -> Recall:
    """Draw texts `k1 v1 k2 v2 ...`, then `queries` of the pairs again in another order: `2 (pairs + queries)` tokens.

    Arora et al., "Zoology", 2023. A model that copies by induction knows every value that is asked for.

    Args:
        vocabulary: the token ids to draw from, int64, at least `2 pairs`: keys and values of a text are all different.

    Raises:
        ValueError: too few tokens to draw from, or more queries than pairs.
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
        rows.append(torch.cat([drawn.flatten(), again.flatten()]))
    tokens = torch.stack(rows)
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    asked[:, 2 * pairs :: 2] = True
    return Recall(tokens, asked, pairs)


@torch.no_grad()
def recalled(model: nn.Module, task: Recall, progress: Callable[[int], None] | None = None) -> list[float]:
    """Return by text the share of the values asked for that are the most likely next token."""
    device, shares = next(model.parameters()).device, []
    for tokens, asked in zip(task.tokens, task.asked, strict=True):
        said = model(input_ids=tokens[None].to(device), use_cache=False).logits[0].argmax(-1).cpu()
        right = said[:-1][asked[:-1]] == tokens[1:][asked[:-1]]
        shares.append(right.double().mean().item())
        if progress is not None:
            progress(1)
    return shares


def word_tokens(tokenizer: PreTrainedTokenizerBase, most: int = 4096) -> Tensor:
    """Return the ids of at most so many tokens that are a word of letters with a space before it, int64 `[words]`."""
    ids = [
        index
        for piece, index in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        if piece[:1] in ("Ġ", "▁") and piece[1:].isascii() and piece[1:].isalpha() and len(piece) > 2
    ]
    return torch.tensor(ids[:most])
