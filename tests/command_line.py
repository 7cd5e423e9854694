"""The command, run in the process of the tests."""

import logging
import re
import sys
from typing import NamedTuple

import pytest


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def attnswap(monkeypatch, capsys):
    """Runs the command in this process; what libraries log and draw is left out of what it prints to stderr."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # their handlers keep the stream of the first test
    monkeypatch.delenv("ATTNSWAP_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    from hf_attnswap import cli

    def run(*arguments) -> Result:
        monkeypatch.setattr(sys, "argv", ["attnswap", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        lines = [line for line in re.split("[\r\n]", printed.err) if line.strip() and "it/s]" not in line]
        return Result(stop.value.code or 0, printed.out, "\n".join(lines))

    return run
