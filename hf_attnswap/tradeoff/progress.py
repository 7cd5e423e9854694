"""Track how far a comparison is: all steps of all arms, weighted by the tokens that a model reads in each."""

from collections.abc import Callable
from dataclasses import dataclass

from .arms import Arm, Settings

TRAINING = 4  # what a token costs that is trained on, beside one that is read: two forward passes and a backward one
DECODING = 8  # a token that is written alone
CHECKS = 500  # tokens that the checks of a swap read
TASK_ITEMS = 100


@dataclass(frozen=True)
class Progress:
    """Hold what a run does now and how much of the whole run is done.

    Attributes:
        line: what is done now, in words.
        done, total: weight of the finished steps and of all steps, in tokens read; 0 as long as these are not known.
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


def alignment(settings: Settings) -> float:
    """Return the weight of the alignment of an arm."""
    return TRAINING * settings.align_tokens


def diagnosis(settings: Settings, layers: int) -> float:
    """Return the weight of a diagnosis: a pass with each of `layers` layers alone swapped, and two of gradients."""
    return settings.diagnose_tokens * (layers + 2 * TRAINING)


def tasks(settings: Settings) -> float:
    """Return the weight of the tasks of an arm."""
    lengths = settings.task_lengths or settings.context_lengths
    return len(settings.tasks) * (settings.task_limit or TASK_ITEMS) * sum(lengths)


def quality(arm: Arm, settings: Settings, layers: int, aligned: bool) -> float:
    """Return the weight of all but the speed of an arm.

    Args:
        layers: attention layers of the model.
        aligned: whether the run trains the arm.
    """
    swapped = arm.attention != "softmax"
    weight = settings.eval_tokens + tasks(settings)
    weight += alignment(settings) if aligned else 0
    return weight + (CHECKS + diagnosis(settings, layers) if swapped else 0)


def speed(settings: Settings, length: int) -> float:
    """Return the weight of one round of one arm at `length` tokens."""
    trained = TRAINING * length if length in settings.train_lengths else 0
    return length + DECODING * settings.decode_tokens + trained
