"""Show comparisons with softmax, marked where the softmax beside the arm was trained too."""

from . import facts
from .table import MARK
from .text import count, interval, plain
from .types import Arm, Report


def ratio(report: Report, arm: Arm, context: int | None) -> str:
    """Return perplexity over that of softmax with its interval, in words; empty where there is none."""
    compared = facts.ratio(report, arm, context)
    return interval(compared) + mark(report, arm) if compared else ""


def mark(report: Report, arm: Arm) -> str:
    """Return the mark for comparisons of `arm` with a trained softmax, else ""; `note` says what the mark means."""
    return MARK if facts.tuned_softmax(report, arm) else ""


def note(report: Report) -> str:
    """Return the sentence on the softmax with which marked arms are compared; empty where no arm is marked."""
    softmaxes = (facts.tuned_softmax(report, arm) for arm in report.arms)
    tuned = next((softmax for softmax in softmaxes if softmax), None)
    if tuned is None:
        return ""
    return f"{MARK} beside {plain(tuned.label)}, trained on {count(tuned.training_tokens)} tokens"
