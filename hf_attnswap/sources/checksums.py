"""Checksums of the files in a folder, by which damage is told even where no size has changed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in `folder` and the folders in it, by the path from `folder`."""
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def damage(folder: Path, expected: Mapping[str, str]) -> str | None:
    """Return in words which file of `folder` is missing or is not what was written; None where all are whole.

    Files that `expected` does not name are none of this function's business.

    Args:
        expected: what `checksums` returned when the files had been written.
    """
    for name, checksum in expected.items():
        try:
            found = _sha256(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != checksum:
            return f"{name} is not what was written: its SHA-256 is {found[:8]}..., not {str(checksum)[:8]}..."
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
