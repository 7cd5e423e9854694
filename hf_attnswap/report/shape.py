"""A small language for the shape of JSON, and what in a value breaks it.

A specification is a dict (an object with at least these keys), a list of one specification, a `Leaf`, or a
`Maybe` (the same, or null). Keys that are not listed are ignored.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Leaf:
    """A value that `accepts` holds for, described in words by `what`."""

    what: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    """Null, or what `spec` accepts."""

    spec: Any


def is_number(value: Any) -> bool:
    """A finite number that fits a float."""
    # The bound refuses NaN, infinities and integers too large for a float. bool is an int in Python.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1.7e308


def is_count(value: Any) -> bool:
    """A whole number of 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**18


def is_date(value: Any) -> bool:
    """A date as ISO 8601 writes it."""
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def one_of(*choices: str) -> Leaf:
    """One of these strings."""
    names = ", ".join(map(repr, choices))
    return Leaf(f"one of {names}", lambda value: isinstance(value, str) and value in choices)


TEXT = Leaf("a string", lambda value: isinstance(value, str))
NAMED = Leaf("a string that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
FLAG = Leaf("true or false", lambda value: isinstance(value, bool))
COUNT = Leaf("a whole number of 0 or more", is_count)
SIZE = Leaf("a whole number of 1 or more", lambda value: is_count(value) and value > 0)
INTEGER = Leaf("a whole number", lambda value: is_number(value) and isinstance(value, int))
NUMBER = Leaf("a finite number", is_number)
AMOUNT = Leaf("a finite number of 0 or more", lambda value: is_number(value) and value >= 0)
POSITIVE = Leaf("a finite number above 0", lambda value: is_number(value) and value > 0)
DATE = Leaf("a date and time as in '2026-11-21T22:00:00+00:00'", is_date)
OBJECT = Leaf("an object", lambda value: isinstance(value, dict))

Problem = tuple[str, Any, str]  # path in the JSON, value, what was expected
MISSING = object()


def _expected(spec: Any) -> str:
    if isinstance(spec, Maybe):
        return f"{_expected(spec.spec)}, or null"
    return spec.what if isinstance(spec, Leaf) else "an object" if isinstance(spec, dict) else "a list"


def problems(value: Any, spec: Any, path: str) -> Iterator[Problem]:
    """Every place where `value` is not what `spec` says."""
    inner = spec.spec if isinstance(spec, Maybe) else spec
    if value is None and inner is not spec:
        return
    if isinstance(inner, Leaf):
        if not inner.accepts(value):
            yield path, value, _expected(spec)
    elif not isinstance(value, type(inner)):
        yield path, value, _expected(spec)
    elif isinstance(inner, list):
        for index, item in enumerate(value):
            yield from problems(item, inner[0], f"{path}[{index}]")
    else:
        for key, item in inner.items():
            where = f"{path}.{key}" if path else key
            if key in value:
                yield from problems(value[key], item, where)
            else:
                yield where, MISSING, _expected(item)
