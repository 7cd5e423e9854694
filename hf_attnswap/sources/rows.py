"""Rows of files and of datasets on the Hub, one after the other, each with the place that errors name."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .structured import parse_json, read_json, shown

# What `datasets` calls the readers of these files, and what they are told. JSON is read here: the reader of `datasets`
# ends the process at `null`, and names no line.
_PARAGRAPHS = ("text", {"sample_by": "paragraph"})
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": _PARAGRAPHS,
    ".md": _PARAGRAPHS,
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {"keep_default_na": False}),  # "null" is a text
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE}),
}
_JSON = (".json", ".jsonl")
SUFFIXES = (*_READERS, *_JSON)

Row = tuple[str, dict[str, Any]]  # where it stands, and its columns


def read_rows(name: str, split: str, config_name: str | None, texts: Sequence[str] = ()) -> Iterator[Row]:
    """Yield every row of a file or of a dataset, after the words for its place: "'a.jsonl', line 3".

    Args:
        name: a file (.txt, .md, .json, .jsonl, .parquet, .csv, .tsv), or the name of a dataset on the Hub.
        split: of the dataset. config_name: of the dataset.
        texts: columns of a .csv or .tsv file that are texts, even where they look like numbers.

    Raises:
        UsageError: the source is not there or cannot be read, or a row is none.
    """
    path = Path(name)
    if path.suffix not in SUFFIXES:
        return _of_datasets(name, path=name, name=config_name, split=split)
    if not path.is_file():
        raise UsageError(f"text file {name!r} does not exist")
    if path.suffix in _JSON:
        return _of_json(path)
    reader, told = _READERS[path.suffix]
    if reader == "csv":
        told = told | {"converters": dict.fromkeys(texts, str)}
    return _of_datasets(name, path=reader, data_files=str(path), split="train", **told)


def _of_datasets(source: str, **told: Any) -> Iterator[Row]:
    import datasets

    number = 0
    with _one_line(source):
        # Streaming: nothing is written beside the source, and a corpus need not fit.
        rows = iter(datasets.load_dataset(**told, streaming=True))
    while True:
        with _one_line(source):
            row = next(rows, None)
        if row is None:
            return
        number += 1
        yield f"{source!r}, row {number}", row


def _of_json(path: Path) -> Iterator[Row]:
    """Yield the objects of a list, or those that stand one on a line, or the single one of a file."""
    for place, value in _json_items(path) if _is_one_value(path) else _json_lines(path):
        if not isinstance(value, dict):
            raise UsageError(f"cannot read text from {place}: it is {shown(value)}; expected an object")
        yield place, value


def _is_one_value(path: Path) -> bool:
    """Return whether a .json file is one value rather than one on each line."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"{}")
    try:
        return isinstance(parse_json(first), list)
    except ValueError:
        return True


def _json_items(path: Path) -> Iterator[tuple[str, Any]]:
    content = read_json(path)
    for number, value in enumerate(content if isinstance(content, list) else [content], 1):
        yield f"{str(path)!r}, item {number}", value


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = parse_json(line)
            except ValueError as error:
                raise UsageError(f"cannot read text from {str(path)!r}, line {number}: {error}") from None
            yield f"{str(path)!r}, line {number}", value


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Whatever fails inside becomes a UsageError with the first line of its reason."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # pandas, pyarrow, datasets and huggingface_hub raise many kinds
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UsageError(f"cannot read text from {source!r}: {reason}") from error
