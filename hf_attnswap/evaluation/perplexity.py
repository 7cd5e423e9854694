"""Perplexity on blocks of text, by context length, with its standard error and paired comparisons."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood per token over blocks, each block a context of its own.

    Attributes:
        context: tokens per block. nll: of each block, mean over its `context - 1` predicted tokens.
    """

    context: int
    nll: tuple[float, ...]

    @property
    def tokens(self) -> int:
        return len(self.nll) * (self.context - 1)

    @property
    def mean(self) -> float:
        return math.fsum(self.nll) / len(self.nll)

    @property
    def perplexity(self) -> float:
        """exp of the mean; inf where that overflows."""
        return math.exp(self.mean) if self.mean < 700 else math.inf

    @property
    def standard_error(self) -> float:
        """Of the mean nll, from the spread between blocks; NaN for a single block."""
        if len(self.nll) < 2:
            return math.nan
        return math.sqrt(math.fsum((x - self.mean) ** 2 for x in self.nll) / (len(self.nll) - 1) / len(self.nll))


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    context: int,
    max_blocks: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Perplexity of `model` on a stream of tokens cut into blocks of `context`.

    Args:
        tokens: int64, any shape; read as one stream.
        max_blocks: use the first so many blocks.

    Raises:
        ValueError: fewer tokens than one block.
    """
    stream = tokens.reshape(-1)
    blocks = stream[: len(stream) // context * context].view(-1, context)[:max_blocks]
    if len(blocks) == 0:
        raise ValueError(f"perplexity at context {context} needs at least that many tokens, got {len(stream)}")
    device = next(model.parameters()).device
    nll: list[float] = []
    for batch in blocks.split(batch_size):
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits
        for row, target in zip(logits[:, :-1], batch[:, 1:], strict=True):
            nll.append(nn.functional.cross_entropy(row.float(), target).item())
        if progress is not None:
            progress(len(batch))
    return Perplexity(context, tuple(nll))


def ratio(ours: Perplexity, control: Perplexity, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Perplexity of ours over that of the control on the same blocks, with its 95 % interval.

    A paired bootstrap over blocks (Koehn 2004): what both find hard cancels.

    Raises:
        ValueError: the two were not measured on the same blocks.
    """
    if (ours.context, len(ours.nll)) != (control.context, len(control.nll)):
        raise ValueError("a ratio of perplexities needs the same blocks for both")
    difference = torch.tensor(ours.nll, dtype=torch.float64) - torch.tensor(control.nll, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(difference), (resamples, len(difference)), generator=generator)
    low, high = torch.quantile(difference[picks].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return tuple(math.exp(min(x, 700)) for x in (difference.mean().item(), low, high))
