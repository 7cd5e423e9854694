"""Read, check and write reports as JSON files; each file is written whole."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from ..errors import UsageError
from ..sources.files import write_whole
from ..sources.structured import read_json, shown
from .types import Report

NAME, VERSION = "hf_attnswap.report", 1
_REPORT = TypeAdapter(Report)


def read(path: str | Path) -> Report:
    """Read the report in the file `path`.

    Raises:
        UsageError: the file cannot be read, or holds no valid report; one sentence with file, place, value and what was
            expected.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise UsageError(f"report {str(path)!r} cannot be read: {error.strerror}") from None
    return parse(content, str(path))


def parse(content: Any, name: str = "report.json") -> Report:
    """Return the report of the content of its JSON, as `to_json` writes it.

    Args:
        name: of the file, for errors.

    Raises:
        UsageError: as `read`.
    """
    if not isinstance(content, dict):
        raise UsageError(f"{name}: the whole is {shown(content)}; expected an object")
    if content.get("schema") != NAME:
        raise UsageError(f"{name}: schema is {shown(content.get('schema'))}; expected {NAME!r}")
    version = content.get("version")
    if version != VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and not isinstance(version, bool) and version > VERSION
        advice = "; a newer hf_attnswap wrote this file: upgrade hf_attnswap to read it" if newer else ""
        raise UsageError(f"{name}: version is {shown(version)}; expected {VERSION}{advice}")
    try:
        return _REPORT.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise UsageError(f"{name}: {_sentence(error)}") from None


def validate(report: Report) -> None:
    """Raise UsageError unless `report` is valid: its fields may have been set since the report was made."""
    try:
        content = json.loads(json.dumps(to_json(report)))
    except (TypeError, ValueError, PydanticSerializationError) as error:
        raise UsageError(f"report.json: {' '.join(str(error).split())[:200]}") from None
    parse(content)


def to_json(report: Report) -> dict[str, Any]:
    """Return the report as plain data, numbers with nine significant digits; what is at its default is left out."""
    content = _REPORT.dump_python(report, exclude_defaults=True, warnings=False)
    return {"schema": NAME, "version": VERSION, **_rounded(content)}


def write(report: Report, path: str | Path) -> Path:
    """Validate `report` and write it to `path` whole: on failure the file that was there stays."""
    validate(report)
    return write_whole(path, f"{_text(to_json(report))}\n".encode())


def _sentence(error: ValidationError) -> str:
    """Return the first problem as place, value and what was expected."""
    problem = error.errors()[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{place} is missing; expected a value"
    return f"{place or 'the whole'} is {shown(problem['input'])}; expected {expected}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _text(value: Any, margin: str = "\n") -> str:
    """Return JSON with a line for each list or object that holds no other: there are many of a layer and its heads."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(item, dict | list) for item in items):
        return json.dumps(value, allow_nan=False)
    inner = f"{margin} "
    if isinstance(value, list):
        return f"[{inner}{f',{inner}'.join(_text(item, inner) for item in value)}{margin}]"
    lines = [f"{json.dumps(key)}: {_text(item, inner)}" for key, item in value.items()]
    return f"{{{inner}{f',{inner}'.join(lines)}{margin}}}"
