"""Make texts that ask for recall: the second half goes on by passages of the first, in any order."""

import torch
from torch import Tensor

# Tokens of a passage: long enough to be recognised by its beginning, short enough to come from many places.
SHORTEST, LONGEST = 8, 64


def with_passages(texts: Tensor, share: float, seed: int) -> Tensor:
    """Return the texts `[B, n]`; in about `share` of them the second half is made of passages of the first.

    A text written twice can be copied from one place that moves along with the row. A passage has to be found first,
    by its beginning, anywhere in what came before, as what a question asks for has to be. What comes next inside a
    passage is known to whoever finds it, so that the loss there is a loss of recall.

    Args:
        texts: int64 `[B, n]`.
        share: from 0 to 1.
        seed: which texts these are, and which passages, is a function of the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    texts, half = texts.clone(), texts.shape[1] // 2
    if half < SHORTEST:
        return texts
    for row in (torch.rand(len(texts), generator=generator) < share).nonzero()[:, 0]:
        at = half
        while at < texts.shape[1]:
            length = draw(SHORTEST, min(LONGEST, half) + 1)
            begin = draw(0, half - length + 1)
            passage = texts[row, begin : begin + length]
            texts[row, at : at + length] = passage[: texts.shape[1] - at]
            at += length
    return texts
