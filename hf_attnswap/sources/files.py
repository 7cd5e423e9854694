"""Files and folders that appear whole under their name, or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import UsageError
from .lock import LOCK


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write `data` to `path` as `whole_file` does; return `path`."""
    with whole_file(path) as stream:
        stream.write(data)
    return Path(path)


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path` that is renamed to `path` when the block ends well.

    Whatever fails before the rename leaves the file that was there before, and no temporary file.
    """
    path = Path(path)
    temporary = _beside(path)
    # Not tempfile: its files are readable by their owner only, and a report is meant to be passed on.
    stream = temporary.open("xb")  # x: never through a link that someone has put there
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends well, and goes when it does not.

    Raises:
        UsageError: `path` exists and is not an empty folder, or has no name, as "." has none.
    """
    path = Path(path)
    require_empty(path)
    if not path.name:
        raise UsageError(f"output folder {str(path)!r} has no name of its own: name a new one")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """Return a path beside `path` that nobody can foresee, and so nobody can have taken."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def require_file(path: Path) -> None:
    """Raise UsageError where no file can be written to `path`: it is a folder, or its folder is not there."""
    if path.is_dir():
        raise UsageError(f"output file {str(path)!r} is a folder: name a file")
    if not path.parent.is_dir():
        raise UsageError(f"output file {str(path)!r} lies in a folder that is not there")


def require_empty(path: Path) -> None:
    """Raise UsageError where `path` is a file, or a folder with something in it."""
    if path.is_file():
        raise UsageError(f"output folder {str(path)!r} is a file")
    if holds_something(path):
        raise UsageError(f"output folder {str(path)!r} is not empty: name another one, or empty it")


def holds_something(folder: Path) -> bool:
    """Return whether `folder` is there and has something in it beside the lock of a process."""
    return folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
