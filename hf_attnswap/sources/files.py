"""Files and folders that appear whole under their name, or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UsageError, shown


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
        UsageError: `path` exists and is not an empty folder.
    """
    path = Path(path)
    require_empty(path)
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


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        UsageError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except RecursionError:
        raise UsageError(f"{path} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: it holds {shown(content)}; expected an object")
    return content


def require_empty(path: Path) -> None:
    """Raise UsageError where `path` is a file, or a folder with something in it."""
    if path.is_file():
        raise UsageError(f"output folder {str(path)!r} is a file")
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"output folder {str(path)!r} is not empty: name another one, or empty it")
