"""Runs what a test draws, and holds every refusal to one sentence of this package."""

import contextlib
import linecache
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import property_settings
import pytest
from hypothesis import given
from hypothesis.strategies import SearchStrategy

import hf_attnswap
from hf_attnswap import UsageError

PACKAGE = Path(hf_attnswap.__file__).parent
# Of each of the five kinds of input: 2,000 in the default suite, 20,000 before a release.
EXAMPLES = pytest.mark.parametrize("examples", (400, pytest.param(4000, marks=pytest.mark.long)))
LIMIT_S = 120  # what takes longer hangs, also where others load the machine; the first of a kind imports much


def every(examples: int, drawn: SearchStrategy, check: Callable[[Any], None]) -> None:
    """Call `check` with so many examples; the default suite draws the same ones every time."""
    property_settings.examples(examples, same=examples == 400)(given(drawn)(check))()


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Raise TimeoutError in what hangs."""

    def stop(*_):
        raise TimeoutError(f"no answer within {LIMIT_S} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def answered(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Return what the call returns, or None where it is refused as it should; any other exception comes through."""
    try:
        with in_time():
            return call(*arguments, **named)
    except (UsageError, ValueError, NotImplementedError) as error:
        if type(error) not in (UsageError, ValueError, NotImplementedError) or not raised_here(error):
            raise
        assert is_sentence(str(error)), repr(str(error))
        return None


def raised_here(error: BaseException) -> bool:
    """Whether a statement of this package raised it, not one that the package calls."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno)
    return Path(last.filename).is_relative_to(PACKAGE) and line.strip().startswith(("raise ", "require("))


def is_sentence(text: str) -> bool:
    """Whether an error is one line that a terminal shows."""
    return len(text) > 10 and text.isprintable()


def files_in(folder: Path) -> set[tuple[str, int]]:
    """The files below a folder with their sizes, hidden ones included."""
    found = set()
    for place, _, names in os.walk(folder):
        found |= {(os.path.join(place, name), os.lstat(os.path.join(place, name)).st_size) for name in names}
    return found
