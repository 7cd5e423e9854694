"""Say in words what the metrics of tasks allow to say of an arm: what likelihood hides."""

from . import beside, facts
from .text import listing, plain
from .types import Arm, Comparison, Metric, Report


def paragraph(report: Report) -> list[str]:
    """Return a sentence on which arms the metrics tell from softmax, by the paired differences.

    Arms with the same words stand together. Controls are left out; the table has them.
    """
    said: dict[str, list[str]] = {}
    for arm in report.arms:
        compared = [(_name(entry), facts.difference(report, arm, entry)) for entry in arm.metrics]
        known = [(name, difference) for name, difference in compared if difference]
        if known and not arm.control:
            said.setdefault(_by_verdict(known), []).append(f"{plain(arm.label)}{beside.mark(report, arm)}")
    if not said:
        return []
    words = "; ".join(f"{listing(arms)} {words}" for words, arms in said.items())
    note = beside.note(report)
    return [f"Tasks, against softmax on the same items: {words}.{f' {note}.' if note else ''}"]


def against(arm: Arm, control: Arm) -> str:
    """Return in words what the metrics say of `arm` against `control`; empty where the two were not compared."""
    compared = [
        (_name(entry), other)
        for entry in arm.metrics
        for other in (entry.difference, *entry.against)
        if other and other.arm == control.label
    ]
    return f"in tasks {_by_verdict(compared)}" if compared else ""


def _name(entry: Metric) -> str:
    return plain(f"{entry.task}: {entry.metric}")


def _by_verdict(compared: list[tuple[str, Comparison]]) -> str:
    """Return counts in words: worse in 2 of 6 (needle at 512: found and ...) and no measurable difference in 4 of 6."""
    said = []
    for verdict in ("worse", "better"):
        names = [name for name, value in compared if value.verdict == verdict]
        if names:
            said.append(f"{verdict} in {len(names)} of {len(compared)} ({listing(names)})")
    for verdict, words in (("no measurable difference",) * 2, (None, "too few items to say")):
        rest = sum(value.verdict == verdict for _, value in compared)
        if rest:
            said.append(f"{words} in {rest} of {len(compared)}")
    return listing(said)
