"""Track how far a long run is, by the tokens that a model reads in each step."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Hold what a run does now and how much of the whole run is done.

    Attributes:
        line: what is done now, in words.
        done, total: weight of the finished steps and of all steps, in tokens read.
    """

    line: str
    done: float
    total: float


class Course:
    """Count what is done and report every step to `observe`.

    Args:
        observe: called with the progress at every step.
        total: weight of the whole run, in tokens read.
        done: the part of that weight that an earlier run of the same command has done.
    """

    def __init__(self, observe: Callable[[Progress], None], total: float, done: float) -> None:
        self.observe, self.total, self.done, self.line = observe, total, done, ""
        self.say("starting")

    def say(self, line: str) -> None:
        """Report `line` as what is done now."""
        self.line = line
        self.observe(Progress(line, min(self.done, self.total), self.total))

    def advance(self, weight: float) -> None:
        """Add `weight` to what is done, and report the progress."""
        self.done += weight
        self.say(self.line)
