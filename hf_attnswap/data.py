"""Text from any `datasets` source, as one stream of tokens cut into blocks."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import UsageError

# What `datasets` calls the readers of these files, and what they are told.
_PARAGRAPHS = ("text", {"sample_by": "paragraph"})
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": _PARAGRAPHS,
    ".md": _PARAGRAPHS,
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {"keep_default_na": False}),  # "null" is a text
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE}),
}


@dataclass(frozen=True)
class TextSource:
    """Where text comes from.

    Attributes:
        name: a file (.txt, .json, .jsonl, .parquet, .csv, .tsv), or the name of a dataset on the Hub.
        split: of the dataset. config_name: of the dataset.
        column: the column that holds the text.
    """

    name: str
    split: str = "train"
    config_name: str | None = None
    column: str = "text"

    def rows(self) -> Iterator[str]:
        """The texts, in their order. UsageError where the source or the column is not there."""
        for row in self._table(self.column):
            yield row[self.column]

    def labelled(self, label_column: str) -> Iterator[tuple[str, str]]:
        """The texts with their labels. UsageError where the source or one of the columns is not there."""
        for row in self._table(self.column, label_column):
            yield row[self.column], str(row[label_column])

    def _table(self, *columns: str) -> Iterable[dict[str, Any]]:
        import datasets

        path = Path(self.name)
        if path.suffix in _READERS:
            if not path.is_file():
                raise UsageError(f"text file {self.name!r} does not exist")
            reader, told = _READERS[path.suffix]
            arguments = {"path": reader, "data_files": str(path), "split": "train", **told}
        else:
            arguments = {"path": self.name, "name": self.config_name, "split": self.split}
        try:
            # Streaming: nothing is written beside the source, and a corpus need not fit.
            table = datasets.load_dataset(**arguments, streaming=True)
            first = next(iter(table), None)
        except Exception as error:
            raise UsageError(f"cannot read text from {self.name!r}: {str(error).splitlines()[0]}") from error
        if first is None:
            raise UsageError(f"text source {self.name!r} is empty")
        for column in columns:
            if column not in first:
                raise UsageError(f"{self.name!r} has no column {column!r}; it has {', '.join(first)}")
        return table


def token_blocks(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, block_size: int, max_tokens: int | None = None
) -> Tensor:
    """Whole blocks of tokens, int64 `[N, block_size]`: the texts one after the other, an empty line between them.

    Args:
        max_tokens: stop there; None reads everything.

    Raises:
        UsageError: the text is shorter than one block.
    """
    pieces: list[list[int]] = []
    total = 0
    separator = tokenizer("\n\n", add_special_tokens=False).input_ids
    for text in source.rows():
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids + separator
        pieces.append(ids)
        total += len(ids)
        if max_tokens is not None and total >= max_tokens:
            break
    usable = total if max_tokens is None else min(total, max_tokens)
    if usable < block_size:
        raise UsageError(
            f"text {source.name!r} gives {usable} tokens, less than one block of {block_size}: "
            "give more text or a smaller block size"
        )
    stream = torch.tensor([i for ids in pieces for i in ids])[: usable // block_size * block_size]
    return stream.view(-1, block_size)
