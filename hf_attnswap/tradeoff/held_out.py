"""The texts of a comparison: blocks that arms are trained on, and what is held out to measure them."""

import itertools
import math
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from ..evaluation.tasks import separate_texts, text_tokens
from ..sources.blocks import cut, end_tokens, start_tokens
from ..sources.texts import TextSource, token_blocks
from .arms import Settings


@dataclass(frozen=True)
class HeldOut:
    """Hold the text that measures quality.

    Attributes:
        tokens: int64 `[n]`, one stream without the tokens that begin a text.
        start: what begins every text, see `sources.blocks.start_tokens`.
        texts: texts by themselves, where a task reads them so.
    """

    tokens: Tensor
    start: list[int]
    texts: list[str]

    def begun(self, length: int) -> Tensor:
        """Return the first tokens as one text of `length` tokens, int64 `[length]`, begun as every text begins."""
        return cut(self.tokens, length, self.start)[0]


def read_texts(
    tokenizer: PreTrainedTokenizerBase,
    training_text: TextSource,
    evaluation_text: TextSource | None,
    settings: Settings,
    closed: bool = False,
) -> tuple[Tensor, HeldOut]:
    """Return the blocks of training text, int64 `[N, block_size]`, and what is held out.

    Args:
        evaluation_text: where it is None, the last fifth of the training text is held out.
        closed: whether blocks of training text end as the tokenizer ends a text, see `sources.texts.token_blocks`.

    Raises:
        UsageError: a text is too short, or the settings do not fit together.
    """
    for length in set(settings.train_lengths) - set(settings.lengths):
        raise UsageError(f"train_lengths has {length}, which is none of the lengths {list(settings.lengths)}")
    by_themselves = separate_texts(settings.tasks, settings.task_limit)
    if by_themselves and evaluation_text is None:
        raise UsageError("the texts that are compared one by one are held-out ones: give them by --validation_file")
    longest = max(*(2 * length for length in settings.context_lengths), *settings.lengths, settings.block_size)
    needed = text_tokens(settings.tasks)
    longest = max(longest, needed, *(settings.task_lengths if needed else ()))
    start, end = start_tokens(tokenizer), end_tokens(tokenizer) if closed else []
    blocks = token_blocks(training_text, tokenizer, settings.block_size, closed=closed)
    if evaluation_text is None:
        held_out = math.ceil(len(blocks) / 5)
        blocks, evaluation = blocks[:-held_out], blocks[-held_out:]
    else:
        evaluation = token_blocks(evaluation_text, tokenizer, settings.block_size, closed=closed)
    if settings.blocks(max(settings.context_lengths)) < 2:
        raise UsageError(
            f"max_eval_tokens is {settings.max_eval_tokens}, less than two blocks of {max(settings.context_lengths)}: "
            "without a second one there is no telling how sure a perplexity is"
        )
    tokens = evaluation[:, len(start) : settings.block_size - len(end)].reshape(-1)
    if tokens.numel() < longest or len(blocks) == 0:
        raise UsageError(
            f"the text leaves {tokens.numel()} tokens for evaluation and {blocks.numel()} for training; "
            f"{longest} and {settings.block_size} are needed: give more text or smaller lengths"
        )
    texts = list(itertools.islice(evaluation_text.rows(), by_themselves)) if evaluation_text else []
    return blocks, HeldOut(tokens, start, texts)
