"""The plots of a report, drawn with matplotlib's Figure alone: no pyplot, no display, no state."""

from . import facts
from .dial import dial
from .drawing import Picture
from .facts import Report
from .tradeoff import tradeoff


def pictures(report: Report) -> list[Picture]:
    """The tradeoff plot, and the dial where there are arms for it."""
    return [tradeoff(report), *([dial(report)] if facts.dial(report) else [])]
