"""Text from any `datasets` source, as one stream of tokens cut into blocks."""

import math
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError, on_one_line
from .blocks import cut, end_tokens, start_tokens
from .rows import SUFFIXES, read_rows
from .structured import as_text
from .tokens import cached, fingerprint


@dataclass(frozen=True)
class TextSource:
    """Say where text comes from.

    Attributes:
        name: a file (.txt, .json, .jsonl, .parquet, .csv, .tsv), or the name of a dataset on the Hub.
        split: of the dataset. config_name: of the dataset.
        column: the column that holds the text.

    Raises:
        UsageError: the name is empty.
    """

    name: str
    split: str = "train"
    config_name: str | None = None
    column: str = "text"

    def __post_init__(self) -> None:
        if not self.name:
            raise UsageError("the name of the text is empty: name a file, or a dataset of the Hub")

    def rows(self) -> Iterator[str]:
        """Yield the texts in their order.

        Raises:
            UsageError: the source or the column is not there, or a row holds something else than a text.
        """
        for (text,) in self._columns(self.column):
            yield text

    def labelled(self, label_column: str) -> Iterator[tuple[str, str]]:
        """Yield the texts with their labels; a label may be a number.

        Raises:
            UsageError: as `rows`, for either column.
        """
        yield from self._columns(self.column, label_column)

    def identity(self) -> dict[str, Any]:
        """Return, as JSON, what tells this source from others, and a file from what it was before it changed."""
        path = Path(self.name)
        if path.suffix not in SUFFIXES or not path.is_file():
            return asdict(self)
        stat = path.stat()
        return {**asdict(self), "name": str(path.resolve()), "size": stat.st_size, "time": stat.st_mtime_ns}

    def _columns(self, *columns: str) -> Iterator[tuple[str, ...]]:
        empty = True
        for place, row in read_rows(self.name, self.split, self.config_name, columns):
            empty = False
            for column in columns:
                if column not in row:
                    raise UsageError(
                        f"{place} has no column {column!r}; it has {on_one_line(', '.join(map(str, row)))}"
                    )
            text, *labels = (row[column] for column in columns)
            values = (text, *(str(label) if isinstance(label, int | float) else label for label in labels))
            for column, value in zip(columns, values, strict=True):
                try:
                    as_text(value)
                except ValueError as error:
                    raise UsageError(f"{place}: {column} is {error}") from None
            yield values
        if empty:
            raise UsageError(f"text source {self.name!r} is empty")


def token_blocks(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_tokens: int | None = None,
    *,
    separate: bool = False,
    closed: bool = False,
    cache_dir: Path | None = None,
) -> Tensor:
    """Return the texts as whole blocks of tokens, int64 `[N, block_size]`, each of which begins as `start_tokens` says.

    Args:
        max_tokens: tokens of all blocks together, at most; None for the whole text.
        separate: as in `token_stream`; blocks are then `[N, block_size, 2]`.
        closed: whether each block also ends as `end_tokens` says, as encoders read every text.
        cache_dir: as in `token_stream`; blocks are then int32 and stay on disk until they are read.

    Raises:
        UsageError: the text is shorter than one block.
    """
    start, end = start_tokens(tokenizer), end_tokens(tokenizer) if closed else []
    stream = token_stream(source, tokenizer, max_tokens, separate=separate, cache_dir=cache_dir)
    if (start or end) and cache_dir is not None:
        name = _name(source, tokenizer, max_tokens, separate, block_size=block_size, end=end)
        pieces = stream.split(_AT_ONCE * max(1, block_size - len(start) - len(end)))
        numbers = cached(cache_dir / f"{name}.int32", (cut(piece, block_size, start, end).numpy() for piece in pieces))
        blocks = numbers.view(-1, block_size, *stream.shape[1:])
    else:
        blocks = cut(stream, block_size, start, end)
    blocks = blocks if max_tokens is None else blocks[: max_tokens // block_size]
    if len(blocks) == 0:
        raise UsageError(
            f"text {source.name!r} gives {len(stream)} tokens, less than one block of {block_size}: "
            "give more text or a smaller block size"
        )
    return blocks


_AT_ONCE = 4096  # blocks in memory while a file of blocks is written


def token_stream(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    *,
    separate: bool = False,
    cache_dir: Path | None = None,
) -> Tensor:
    """Return the texts in a row as token ids, int64 `[n]`, an empty line between them, for `blocks.cut` to cut.

    Args:
        max_tokens: stop there; None reads everything.
        separate: the rows of the source (the paragraphs of a .txt) are documents that must not see each other. Each
            begins as the tokenizer begins a text, and an end-of-text token follows each, where the tokenizer has one.
            The stream is then `[n, 2]`: tokens, and 1 where a document begins.
        cache_dir: keep the tokens in a file there, and take them from it next time; they are then int32 and stay on
            disk until they are read. A file is known by path, size and time, a dataset of the Hub by its name alone.

    Raises:
        UsageError: the source or its column is not there.
    """
    chunks = _chunks(source, tokenizer, max_tokens, separate)
    if cache_dir is None:
        stream = torch.tensor([number for chunk in chunks for number in chunk], dtype=torch.int64)
    else:
        stream = cached(cache_dir / f"{_name(source, tokenizer, max_tokens, separate)}.int32", chunks)
    return stream.view(-1, 2) if separate else stream


def _name(source: TextSource, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, separate: bool, **more: Any):
    """The name of a file of tokens; `start` is in it because tokenizers may be told to begin texts otherwise."""
    start = start_tokens(tokenizer)
    return fingerprint(
        tokenizer, source=source.identity(), max_tokens=max_tokens, separate=separate, start=start, **more
    )


def _chunks(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, separate: bool
) -> Iterator[array]:
    """The tokens of one text after the other, and where they are separate 1 or 0 beside each; `max_tokens` at most."""
    start, end = [], tokenizer("\n\n", add_special_tokens=False).input_ids
    if separate:
        start, end = start_tokens(tokenizer), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    left = math.inf if max_tokens is None else max_tokens
    for text in source.rows():
        ids = start + tokenizer(text, add_special_tokens=False, verbose=False).input_ids + end
        ids = ids[: min(len(ids), left)]
        left -= len(ids)
        yield array("i", ids if not separate else [n for i, token in enumerate(ids) for n in (token, int(i == 0))])
        if left <= 0:
            return
