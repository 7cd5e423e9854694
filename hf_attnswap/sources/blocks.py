"""Cut a stream of tokens into the blocks that a model reads, which begin as its tokenizer begins every text."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError

_MOST = 2**62  # tokens of a block; what is larger is no size of a tensor


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that the tokenizer puts before every text, such as BOS or [CLS]; an empty list for none.

    A model that was trained with them relies on them: without its BOS, Gemma has three times the perplexity.
    """
    return _around(tokenizer)[0]


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that the tokenizer puts after every text, such as [SEP]; an empty list for none."""
    return _around(tokenizer)[1]


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    plain = list(tokenizer("a", add_special_tokens=False).input_ids)
    whole = list(tokenizer("a").input_ids)
    places = range(len(whole) - len(plain) + 1)
    at = next((at for at in places if whole[at : at + len(plain)] == plain), None)
    return ([], []) if at is None else (whole[:at], whole[at + len(plain) :])


def cut(stream: Tensor, block_size: int, start: Sequence[int] = (), end: Sequence[int] = ()) -> Tensor:
    """Return whole blocks of a stream of tokens, each of which begins with the tokens of `start` and ends with `end`.

    Training, evaluation and reports all cut texts here. What does not fill the last block is left out.

    Args:
        stream: token ids without those of `start` and `end`, integers `[n]`; or `[n, 2]`: tokens, and 1 where a
            document begins.
        block_size: tokens per block, those of `start` and `end` included.
        start: see `start_tokens`. Where documents are separate, the start of a block counts as the beginning of one.
        end: see `end_tokens`; for models that read both ways, which get every text so.

    Returns:
        `[N, block_size]` or `[N, block_size, 2]`, in the dtype of the stream; a view of it where nothing is put around.

    Raises:
        UsageError: a block has no room for a token beside those of `start` and `end`, or is larger than any tensor.
    """
    own = block_size - len(start) - len(end)
    if own < 1:
        closing = f" and the {len(end)} that end it" if end else ""
        raise UsageError(
            f"block size {block_size} leaves no room for text after the {len(start)} tokens that begin a block{closing}"
        )
    if own > _MOST:
        raise UsageError(f"block size {block_size} is more than any text has; expected at most {_MOST}")
    blocks = stream[: len(stream) // own * own].view(-1, own, *stream.shape[1:])
    if not start and not end:
        return blocks
    around = [torch.tensor(list(tokens), dtype=stream.dtype, device=stream.device) for tokens in (start, end)]
    if stream.dim() == 2:
        around = [torch.stack([tokens, torch.zeros_like(tokens)], dim=1) for tokens in around]
        around[0][:1, 1] = 1
    first, last = (tokens.expand(len(blocks), *tokens.shape) for tokens in around)
    return torch.cat([first, blocks, last], dim=1)
