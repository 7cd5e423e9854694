"""How far a comparison is: all steps of all arms, weighted by the tokens that a model reads in them."""

from collections.abc import Callable
from dataclasses import dataclass

from .arms import Arm, Settings

TRAINING = 4  # what a token costs that is trained on, beside one that is read: two forward passes and a backward one
DECODING = 8  # a token that is written alone
CHECKS = 500  # tokens that the checks of a swap read
TASK_ITEMS = 20


@dataclass(frozen=True)
class Progress:
    """What is done now, and how much of the whole is done, in tokens read."""

    line: str
    done: float
    total: float


class Course:
    """Counts what is done and tells `observe` of every step.

    Args:
        total: the weight of the whole run. done: what an earlier run of the same command has done of it.
    """

    def __init__(self, observe: Callable[[Progress], None], total: float, done: float) -> None:
        self.observe, self.total, self.done, self.line = observe, total, done, ""
        self.say("starting")

    def say(self, line: str) -> None:
        """Tell what is done now."""
        self.line = line
        self.observe(Progress(line, min(self.done, self.total), self.total))

    def advance(self, weight: float) -> None:
        """Count work as done."""
        self.done += weight
        self.say(self.line)


def alignment(settings: Settings) -> float:
    """Return the weight of the alignment of an arm."""
    return TRAINING * settings.align_tokens


def diagnosis(settings: Settings, layers: int) -> float:
    """Return the weight of a look into `layers` layers: each is swapped alone once, and there are gradients."""
    return settings.diagnose_tokens * (layers + 2 * TRAINING)


def tasks(settings: Settings) -> float:
    """Return the weight of the tasks of an arm."""
    return len(settings.tasks) * (settings.task_limit or TASK_ITEMS) * max(settings.context_lengths)


def quality(arm: Arm, settings: Settings, layers: int, aligned: bool) -> float:
    """Return the weight of all but the speed of an arm."""
    swapped = arm.attention != "softmax"
    weight = settings.max_eval_tokens * len(settings.context_lengths) + tasks(settings)
    weight += alignment(settings) if aligned else 0
    return weight + (CHECKS + diagnosis(settings, layers) if swapped else 0)


def speed(settings: Settings, length: int) -> float:
    """Return the weight of one round of one arm at `length` tokens."""
    trained = TRAINING * length if length in settings.train_lengths else 0
    return length + DECODING * settings.decode_tokens + trained
