"""Weigh the steps of all arms of a comparison, by the tokens that a model reads in each."""

from ..evaluation.course import Course, Progress
from .arms import Arm, Settings

__all__ = ["Course", "Progress", "alignment", "diagnosis", "quality", "speed", "tasks"]

TRAINING = 4  # what a token costs that is trained on, beside one that is read: two forward passes and a backward one
DECODING = 8  # a token that is written alone
CHECKS = 500  # tokens that the checks of a swap read
TASK_ITEMS = 100


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
