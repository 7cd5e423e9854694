"""Run `python -m hf_attnswap.training`."""

from ..errors import one_line_errors
from .command import PROGRAM, main

if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        main()
