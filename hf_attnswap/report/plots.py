"""Draw the plots of a report with matplotlib's Figure alone: no pyplot, no display, no state."""

from . import facts
from . import plan as plans
from .dial import dial
from .drawing import Picture
from .layers import layers
from .positions import positions
from .tradeoff import tradeoff
from .types import Report

NAMES = ("plan", "tradeoff", "dial", "positions", "layers")


def pictures(report: Report) -> list[Picture]:
    """Return the plots for which there is something to draw: plan, tradeoff, dial, positions, layers."""
    only_metrics = facts.metrics(report) and not facts.contexts(report)
    found = [plans.plan(report)] if plans.shown(report) else []
    found += [tradeoff(report)] if report.kind == "tradeoff" and not only_metrics else []
    found += [dial(report)] if facts.dial(report) else []
    found += [positions(report)] if facts.with_positions(report) else []
    return found + ([layers(report)] if facts.with_diagnostics(report) else [])
