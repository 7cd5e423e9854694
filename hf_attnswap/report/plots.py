"""Draw the plots of a report with matplotlib's Figure alone: no pyplot, no display, no state."""

from . import facts
from .dial import dial
from .drawing import Picture
from .layers import layers
from .positions import positions
from .tradeoff import tradeoff
from .types import Report

NAMES = ("tradeoff", "dial", "positions", "layers")


def pictures(report: Report) -> list[Picture]:
    """Return the tradeoff plot, and the others for which there is something to draw: dial, positions, layers."""
    only_metrics = facts.metrics(report) and not facts.contexts(report)
    found = [tradeoff(report)] if report.kind == "tradeoff" and not only_metrics else []
    found += [dial(report)] if facts.dial(report) else []
    found += [positions(report)] if facts.with_positions(report) else []
    return found + ([layers(report)] if facts.with_diagnostics(report) else [])
