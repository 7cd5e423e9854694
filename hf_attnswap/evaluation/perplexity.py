"""Measure perplexity per token, word and byte, by context length and position, with errors and paired ratios."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from ..integration.objectives import input_device
from ..sources.blocks import cut
from ..statistics import Estimate, paired_bootstrap

# The logits of one pass on a GPU: a GiB in float32.
LOGITS_AT_ONCE = 1 << 28


@dataclass(frozen=True)
class Perplexity:
    """Hold the negative log-likelihood (nll) of samples of a text that predict equally many tokens each.

    Attributes:
        context: tokens of a block or window; a prediction has at most `context - 1` tokens before it.
        nll: mean nll of each sample, nats per token.
        stride: tokens that each window predicts; None for separate blocks, which predict all but their first tokens.
        by_position: mean nll by position in the context: (first position, last position, nll); empty for sliding
            windows.
        given: tokens at the start of a block that are not predicted: the first one, or those that begin every text.
    """

    context: int
    nll: tuple[float, ...]
    stride: int | None = None
    by_position: tuple[tuple[int, int, float], ...] = field(default=(), compare=False)
    given: int = 1

    @property
    def tokens(self) -> int:
        """Return the number of tokens predicted."""
        return len(self.nll) * (self.stride or self.context - self.given)

    @property
    def mean(self) -> float:
        """Return the mean nll over all samples, nats per token."""
        return math.fsum(self.nll) / len(self.nll)

    @property
    def perplexity(self) -> float:
        """Return the exponential of the mean nll; inf where the exponential overflows."""
        return _exp(self.mean)

    @property
    def standard_error(self) -> float:
        """Return the standard error of the mean nll, from the spread between samples; NaN for a single sample."""
        if len(self.nll) < 2:
            return math.nan
        return math.sqrt(math.fsum((x - self.mean) ** 2 for x in self.nll) / (len(self.nll) - 1) / len(self.nll))

    def per(self, units: int) -> float:
        """Return `exp(-log-likelihood / units)`, the perplexity per word or byte of the text, as in lm-eval."""
        return _exp(self.mean * self.tokens / units)


Progress = Callable[[int], None]


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    context: int,
    max_blocks: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    start: Sequence[int] = (),
) -> Perplexity:
    """Measure the perplexity of `model` on a stream of tokens, cut into blocks that are read independently.

    The log-softmax is computed in float32.

    Args:
        tokens: int64, any shape; read as one stream.
        context: tokens per block, those of `start` included.
        max_blocks: how many blocks are used, from the first on; None for all.
        batch_size: blocks per forward pass; as many as suit the device by default.
        progress: called with the number of blocks read since the last call.
        start: what begins every block and is not predicted (`sources.blocks.start_tokens`); where it is empty, the
            first token of each block is not predicted.

    Raises:
        UsageError: there are fewer tokens than one block has.
    """
    stream, given = tokens.reshape(-1), max(1, len(start))
    blocks = cut(stream, context, start)[:max_blocks]
    if len(blocks) == 0 or context == given:
        raise UsageError(
            f"the text gives {len(stream)} tokens, less than one block of {context}: give more text or a shorter "
            "context"
        )
    return block_perplexity(model, blocks, given, batch_size, progress)


@torch.no_grad()
def block_perplexity(
    model: nn.Module, blocks: Tensor, given: int = 1, batch_size: int | None = None, progress: Progress | None = None
) -> Perplexity:
    """Measure the perplexity of `model` on blocks of tokens, as `perplexity` does.

    Args:
        blocks: int64 `[N, context]`.
        given: tokens at the start of each block that are not predicted.
        batch_size: blocks per forward pass; as many as suit the device by default.
        progress: called with the number of blocks read since the last call.
    """
    context, means = blocks.shape[1], []
    total = torch.zeros(context - given, dtype=torch.float64)
    for nll in _token_nll(model, blocks, context - given, batch_size, progress):
        means += nll.mean(1).tolist()
        total += nll.double().sum(0)
    mean = (total / len(blocks)).tolist()
    positions = [(max(first, given), last) for first, last in octaves(context - 1) if last >= given]
    by_position = tuple(
        (first, last, math.fsum(mean[first - given : last - given + 1]) / (last - first + 1))
        for first, last in positions
    )
    return Perplexity(context, tuple(means), by_position=by_position, given=given)


@torch.no_grad()
def sliding_perplexity(
    model: nn.Module,
    tokens: Tensor,
    context: int,
    stride: int,
    max_windows: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    start: Sequence[int] = (),
) -> Perplexity:
    """Measure the perplexity of `model` with sliding windows, which give every prediction a long context.

    Windows of `context` tokens move on by `stride`, and each window predicts its last `stride` tokens. So every token
    is predicted from at least `context - stride` tokens, as far as the text has so many before that token. The cost is
    `context / stride` times that of `perplexity`. Windows share text, so the standard error is somewhat too small.

    Args:
        tokens: int64, any shape; read as one stream.
        context: tokens per window, those of `start` included.
        max_windows: how many windows are used, from the first on; None for all.
        batch_size: windows per forward pass; as many as suit the device by default.
        progress: called with the number of windows read since the last call.
        start: what begins every window and is not predicted, as in `perplexity`.

    Raises:
        UsageError: `stride` is not between 1 and what a window predicts at most, or the text is shorter than that.
    """
    given = max(1, len(start))
    if not 1 <= stride <= context - given:
        raise UsageError(f"stride is {stride}; expected 1 to {context - given}, less than the context")
    stream, own, first = tokens.reshape(-1), context - len(start), stride + given - len(start)
    ends = range(first, len(stream) + 1, stride)[:max_windows]
    if not ends:
        raise UsageError(f"a stride of {stride} needs at least {first} tokens, there are {len(stream)}")
    means: list[float] = []
    growing = [cut(stream[:end], len(start) + end, start) for end in ends if end < own]
    moving = [cut(stream[end - own : end], context, start) for end in ends if end >= own]
    for windows in (*growing, *([torch.cat(moving)] if moving else [])):
        for nll in _token_nll(model, windows, stride, batch_size, progress):
            means += nll.mean(1).tolist()
    return Perplexity(context, tuple(means), stride, given=given)


def _token_nll(model, blocks: Tensor, predicted: int, batch_size: int | None, progress) -> Iterator[Tensor]:
    """Yield the nll of the last `predicted` tokens of each block, float32 `[b, predicted]`, batch by batch."""
    device = input_device(model)
    if batch_size is None and device.type != "cpu":  # which one short block leaves idle
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        batch_size = max(1, LOGITS_AT_ONCE // (blocks.shape[1] * vocabulary))
    for batch in blocks.split(batch_size or 1):
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits[:, -predicted - 1 : -1]
        # Row by row: log_softmax of all at once would hold the vocabulary twice for each.
        rows = zip(logits, batch[:, -predicted:], strict=True)
        yield torch.stack([nn.functional.cross_entropy(row.float(), to, reduction="none") for row, to in rows]).cpu()
        if progress is not None:
            progress(len(batch))


def octaves(last: int) -> list[tuple[int, int]]:
    """Return the positions 1 to `last` in ranges that double: (1, 1), (2, 3), (4, 7), ..."""
    return [(1 << i, min((2 << i) - 1, last)) for i in range(last.bit_length())]


@dataclass(frozen=True)
class Units:
    """Hold the size of the predicted text in other units than tokens.

    Attributes:
        words: number of words, which white space separates.
        bytes: number of bytes in UTF-8.
    """

    words: int
    bytes: int


def count_units(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    context: int,
    samples: int,
    stride: int | None = None,
    start: Sequence[int] = (),
) -> Units:
    """Return the words and UTF-8 bytes of the text that a `Perplexity` of `samples` samples predicts.

    Where `start` or the text begins with a token that starts a text, the space that some tokenizers write after that
    token counts.

    Args:
        tokens: int64, any shape; read as one stream.
        context: tokens per block.
        samples: number of blocks, or of windows where `stride` is given.
        stride: tokens that each window predicts; None for separate blocks.
        start: what begins every block, as in `perplexity`.
    """
    stream, given = tokens.reshape(-1), max(1, len(start))

    def text(ids: Tensor) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    if stride is None:
        pieces = cut(stream, context, start)[:samples]
    else:
        predicted = samples * stride + given - len(start)
        pieces = cut(stream[:predicted], predicted + len(start), start)
    # Less what is given: a tokenizer may write a piece differently where a text starts.
    size = sum(_bytes(text(piece)) - _bytes(text(piece[:given])) for piece in pieces)
    return Units(sum(len(text(piece[given:]).split()) for piece in pieces), size)


def compare(ours: Perplexity, control: Perplexity, seed: int = 0) -> Estimate:
    """Return the mean nll of `ours` minus that of `control` on the same text, with its interval from paired samples.

    Raises:
        ValueError: the two were not measured on the same samples.
    """
    if any(getattr(ours, key) != getattr(control, key) for key in ("context", "stride", "given", "tokens")):
        raise ValueError("a ratio of perplexities needs the same blocks for both")
    return paired_bootstrap(ours.nll, control.nll, seed=seed)


def ratio(ours: Perplexity, control: Perplexity, seed: int = 0) -> dict[str, Any]:
    """Return the perplexity of `ours` divided by that of `control` on the same blocks, with its interval.

    The ratio and its bounds are the exponentials of `compare`, cut off at e^700.

    Returns:
        `value`, `low`, `high`, `items`, `few` and `verdict`; `low`, `high` and `verdict` are None for too few blocks.

    Raises:
        ValueError: the two were not measured on the same samples.
    """
    found = compare(ours, control, seed)
    logs = {name: getattr(found, name) for name in ("value", "low", "high")}
    bounds = {name: None if log is None else math.exp(min(log, 700)) for name, log in logs.items()}
    return bounds | {"items": found.items, "few": found.few, "verdict": found.verdict(lower_is_better=True)}


def _bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


def _exp(x: float) -> float:
    return math.exp(x) if not x >= 700 else math.inf
