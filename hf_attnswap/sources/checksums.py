"""Checksums of the files in a folder, by which damage is told even where no size has changed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import UsageError

CHECKSUMS = "checksums.json"  # beside the files, or beside their folder


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


def require_whole(model: str | Path) -> None:
    """Check the folder of a model that a stage of training wrote, by the checksums that it left beside the folder.

    Other models are none of this function's business.

    Raises:
        UsageError: a file is missing or is not what the stage wrote, or the checksums cannot be read.
    """
    folder = Path(model)
    path = folder.parent / CHECKSUMS
    if folder.name != "model" or not path.is_file():
        return
    try:
        found = damage(folder, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{str(path)!r} holds no checksums: {error}; remove it to go without") from None
    if found is not None:
        raise UsageError(
            f"{str(folder)!r} has changed since its stage wrote it: {found}. Remove the folder and give the command of "
            f"the stage again, which goes on from its last checkpoint; or remove {str(path)!r} if that was meant"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
