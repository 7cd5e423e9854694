"""Wrong use: the one exception, and the one line that programs print for it."""

import argparse
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class UsageError(ValueError):
    """Say that what was asked for cannot be.

    An unknown name, an unfit option, a model or a file that is not what it should be.
    Its message is one sentence with the value, the place and what to do.
    """


def shown(value: Any) -> str:
    """Return `value` as an error quotes it: on one line, and cut where that gets long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def on_one_line(text: str) -> str:
    """Return `text` with an escape for whatever a terminal would obey rather than show, such as the end of a line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Parser(argparse.ArgumentParser):
    """Parse arguments as argparse does, but raise each error as a UsageError, which programs print as one line."""

    def __init__(self, **arguments: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End the program with one line on stderr in place of a traceback, which ATTNSWAP_DEBUG=1 shows.

    Exit code 2 for wrong use, 1 for failure, 130 when interrupted.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("ATTNSWAP_DEBUG"):
            traceback.print_exc()
        code = 2 if isinstance(error, UsageError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        line = "interrupted" if code == 130 else (str(error).strip() or repr(error)).splitlines()[0]
        print(f"{program}: {on_one_line(line)}", file=sys.stderr)
        sys.exit(code)
