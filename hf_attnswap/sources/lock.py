"""One process at a time in a folder."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".attnswap.lock"  # lies in the folder while a process is in it, and names that process
logger = logging.getLogger(__name__)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder` while the context is open.

    The system lets go when this process ends, however it ends; what a killed process leaves of the lock hinders nobody.
    The folder is made where it is missing, and goes again where nothing has been put into it.

    Raises:
        UsageError: another process is in the folder, or the folder cannot be made or written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if folder.is_file():
        raise UsageError(f"output folder {str(folder)!r} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = _open(folder / LOCK)
    except OSError as error:
        raise UsageError(f"output folder {str(folder)!r} cannot be written to: {error.strerror}") from None
    try:
        held = _take(folder / LOCK, opened)
        try:
            yield
        finally:
            if held is not None:
                (folder / LOCK).unlink(missing_ok=True)
                os.close(held)
    finally:
        with suppress(OSError):  # something is in it
            for path in made:
                path.rmdir()


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)


def _take(path: Path, opened: int) -> int | None:
    """Return the open file that holds the lock; None, with a warning, where there is no locking."""
    while True:
        try:
            if fcntl is None:
                raise OSError("no fcntl")
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(opened, 200).decode(errors="replace").strip() or "another process"
            os.close(opened)
            raise UsageError(
                f"output folder {str(path.parent)!r} is in use by {who}: wait until it ends, or name another folder"
            ) from None
        except OSError as error:
            logger.warning("no other process is kept out of %r, which cannot be locked: %s", str(path.parent), error)
            os.close(opened)
            path.unlink(missing_ok=True)
            return None
        try:
            if os.fstat(opened).st_ino == os.stat(path).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(opened)  # the one who held it has removed it since it was opened
        opened = _open(path)
    os.ftruncate(opened, 0)
    os.write(opened, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return opened
