"""Comparisons with softmax as they are shown, marked where the softmax beside the arm was trained too."""

from . import facts
from .table import MARK
from .text import count, interval, plain
from .types import Arm, Report


def ratio(report: Report, arm: Arm, context: int | None) -> str:
    """Perplexity over softmax's with its interval; empty where there is none."""
    compared = facts.ratio(report, arm, context)
    return interval(compared) + mark(report, arm) if compared else ""


def mark(report: Report, arm: Arm) -> str:
    """What marks the comparisons of `arm` with softmax; `note` says what it means."""
    return MARK if facts.tuned_softmax(report, arm) else ""


def note(report: Report) -> str:
    """Which softmax the marked arms stand beside; empty where none is marked."""
    softmaxes = (facts.tuned_softmax(report, arm) for arm in report.arms)
    tuned = next((softmax for softmax in softmaxes if softmax), None)
    if tuned is None:
        return ""
    return f"{MARK} beside {plain(tuned.label)}, trained on {count(tuned.training_tokens)} tokens"
