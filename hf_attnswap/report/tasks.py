"""Tasks in words and as a table: what likelihood hides."""

from . import beside, facts
from .facts import Arm, Report
from .text import count, listing, number, plain


def title(entry: dict) -> str:
    """The column of a metric: needle at 512, found (20 items)."""
    worse = "" if entry["higher_is_better"] else ", lower is better"
    return plain(f"{entry['task']}: {entry['metric']}{worse} ({count(entry['items'])} items)")


def cell(report: Report, arm: Arm, key: tuple[str, str]) -> str:
    """Value and difference to softmax with its interval, or None where the arm has no such metric."""
    entry = facts.task_of(arm, key)
    if entry is None:
        return "not measured"
    if entry["value"] is None:
        return "not finite"
    value = number(entry["value"])
    if arm is facts.reference(report):
        return f"{value} (reference)"
    found = facts.task_difference(report, arm, entry)
    return f"{value}; {difference(found)}{beside.mark(report, arm)}" if found else f"{value} (no interval)"


def difference(found: dict) -> str:
    few = "*" if found["few"] else ""
    return f"{signed(found['value'])} ({signed(found['low'])} to {signed(found['high'])}){few}"


def signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value)}"


def paragraph(report: Report) -> list[str]:
    """Which arms the tasks tell from softmax, by the paired differences: arms of which the same can be said, together.

    Controls are left out; the table has them.
    """
    said: dict[str, list[str]] = {}
    for arm in report["arms"]:
        compared = [(_name(entry), facts.task_difference(report, arm, entry)) for entry in arm["tasks"]]
        found = [(name, difference) for name, difference in compared if difference]
        if found and not arm["control"]:
            said.setdefault(_by_verdict(found), []).append(f"{plain(arm['label'])}{beside.mark(report, arm)}")
    if not said:
        return []
    told = "; ".join(f"{listing(arms)} {words}" for words, arms in said.items())
    note = beside.note(report)
    return [f"Tasks, against softmax on the same items: {told}.{f' {note}.' if note else ''}"]


def against(arm: Arm, control: Arm) -> str:
    """What the tasks say of `arm` against another that it was compared with; empty where there is nothing."""
    found = [
        (_name(entry), other)
        for entry in arm["tasks"]
        for other in entry["against"]
        if other["arm"] == control["label"]
    ]
    return f"in tasks {_by_verdict(found)}" if found else ""


def _name(entry: dict) -> str:
    return plain(f"{entry['task']}: {entry['metric']}")


def _by_verdict(found: list[tuple[str, dict]]) -> str:
    """worse in 2 of 6 (needle at 512: found and ...) and no measurable difference in 4 of 6"""
    said = []
    for verdict in ("worse", "better"):
        names = [name for name, compared in found if compared["verdict"] == verdict]
        if names:
            said.append(f"{verdict} in {len(names)} of {len(found)} ({listing(names)})")
    rest = sum(compared["verdict"] == "no measurable difference" for _, compared in found)
    if rest:
        said.append(f"no measurable difference in {rest} of {len(found)}")
    return listing(said)
