"""Finding again what stands far back: a needle in a haystack, and many keys with their values. Generated, seeded."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .likelihood import Request, encode_pair, log_likelihoods

_HAY = (
    "The grass is green. The sky is blue. The sun is warm. The road goes on. The river runs to the sea. "
    "The birds sing in the trees. The children play by the house. The old man reads his book. "
)
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
_QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Needle:
    """One text with a number hidden in it.

    Attributes:
        length: tokens, the question included. depth: where it is hidden, 0 (at the start) to 1 (at the question).
    """

    length: int
    depth: float
    request: Request


def needles(
    tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], depths: Sequence[float], repeats: int = 1, seed: int = 0
) -> list[Needle]:
    """`repeats` texts for every length and depth, each with a number of five digits of its own. Within a length the
    depths come in turn.

    After the passkey task of Mohtashami and Jaggi, "Landmark attention", 2023.

    Raises:
        ValueError: a length that leaves no room for needle and question.
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

    question = encode_pair(tokenizer, _QUESTION, f" {key}")
    hay, needle = encode(_HAY), encode(_NEEDLE.format(key=key))
    room = length - len(needle) - len(question.prompt) - len(question.target)
    if room < 0:
        raise ValueError(f"a haystack of {length} tokens has no room for its needle: give at least {length - room}")
    before = round(room * depth)
    straw = (hay * (room // len(hay) + 1))[:room]
    return Request((*straw[:before], *needle, *straw[before:], *question.prompt), question.target)


def found_needles(model: nn.Module, items: Sequence[Needle], batch_size: int = 1) -> list[bool]:
    """Whether the model, reading greedily, says the number: all of its tokens are the most likely ones."""
    return [found.greedy for found in log_likelihoods(model, [item.request for item in items], batch_size)]


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall: pairs of random tokens, then some of the first again.

    tokens: int64 `[N, length]`. asked: bool `[N, length]`, the keys that come again; what follows each is its value.
    """

    tokens: Tensor
    asked: Tensor
    pairs: int

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


def recalls(vocabulary: Tensor, pairs: int, queries: int, texts: int = 8, seed: int = 0) -> Recall:
    """`k1 v1 k2 v2 ...`, then `queries` of the pairs again in another order: `2 (pairs + queries)` tokens.

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
    """Share of the values asked for that are the most likely next token, by text."""
    device, shares = next(model.parameters()).device, []
    for tokens, asked in zip(task.tokens, task.asked, strict=True):
        said = model(input_ids=tokens[None].to(device), use_cache=False).logits[0].argmax(-1).cpu()
        right = said[:-1][asked[:-1]] == tokens[1:][asked[:-1]]
        shares.append(right.double().mean().item())
        if progress is not None:
            progress(1)
    return shares


def word_tokens(tokenizer: PreTrainedTokenizerBase, most: int = 4096) -> Tensor:
    """Ids of tokens that are a word of letters with a space before it, at most so many, as `recalls` draws from."""
    ids = [
        index
        for piece, index in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        if piece[:1] in ("Ġ", "▁") and piece[1:].isascii() and piece[1:].isalpha() and len(piece) > 2
    ]
    return torch.tensor(ids[:most])
