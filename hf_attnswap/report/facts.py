"""What the tables, the summary and the plots ask of a report: selections, no words and no formatting."""

from collections import Counter
from math import log
from typing import Any

Arm = dict[str, Any]
Report = dict[str, Any]


def reference(report: Report) -> Arm | None:
    """The softmax arm that speed-ups and most ratios refer to: the one not trained, where there are several."""
    arms = [arm for arm in report["arms"] if arm["attention"] == "softmax"]
    return min(arms, key=lambda arm: (arm["alignment"] is not None, bool(arm["training"])), default=None)


def contexts(report: Report) -> list[int]:
    """Every context at which a perplexity was asked for, ascending."""
    return sorted({entry["context"] for arm in report["arms"] for entry in arm["perplexity"]})


def lengths(report: Report) -> list[int]:
    """Every length at which speed was asked for, ascending."""
    return sorted({entry["length"] for arm in report["arms"] for entry in arm["speed"]})


def perplexity_at(arm: Arm, context: int | None) -> dict | None:
    """The perplexity entry of `arm` at `context`."""
    return next((entry for entry in arm["perplexity"] if entry["context"] == context), None)


def speed_at(arm: Arm, length: int) -> dict | None:
    """The speed entry of `arm` at `length`."""
    return next((entry for entry in arm["speed"] if entry["length"] == length), None)


def metrics(report: Report) -> dict[tuple[str, str], dict]:
    """Every (task, metric) that was measured, with the first entry of it."""
    found: dict[tuple[str, str], dict] = {}
    for arm in report["arms"]:
        for entry in arm["tasks"]:
            found.setdefault((entry["task"], entry["metric"]), entry)
    return found


def task_of(arm: Arm, key: tuple[str, str]) -> dict | None:
    """The entry of `arm` for a (task, metric)."""
    return next((entry for entry in arm["tasks"] if (entry["task"], entry["metric"]) == key), None)


def ratio(report: Report, arm: Arm, context: int | None) -> dict | None:
    """Perplexity of `arm` over softmax's at `context` with its interval; None where there is none.

    Softmax is `tuned_softmax(report, arm)`, else the reference.
    """
    entry = perplexity_at(arm, context)
    return entry and _beside_softmax(report, arm, entry, "ratio")


def task_difference(report: Report, arm: Arm, entry: dict) -> dict | None:
    """A task of `arm` less softmax's with its interval; None where there is none. Which softmax: as in `ratio`."""
    return _beside_softmax(report, arm, entry, "difference")


def _beside_softmax(report: Report, arm: Arm, entry: dict, key: str) -> dict | None:
    tuned = tuned_softmax(report, arm)
    return _against(entry, tuned) if tuned else entry[key]


def tuned_softmax(report: Report, arm: Arm) -> Arm | None:
    """The trained softmax that the quality of `arm` is compared with: of a trained arm the one trained most, because
    text teaches its style to every model. None where there is none: the arm is compared with the reference."""
    if not arm["training"] or arm["attention"] == "softmax":
        return None
    arms = [other for other in report["arms"] if other["attention"] == "softmax" and other["training"]]
    arms = [other for other in arms if any(_against(entry, other) for entry in [*arm["perplexity"], *arm["tasks"]])]
    return max(arms, key=lambda other: other["training_tokens"], default=None)


def against(arm: Arm, other: Arm, context: int | None) -> dict | None:
    """Perplexity of `arm` over that of `other` at `context`, compared block by block; None where it was not."""
    entry = perplexity_at(arm, context)
    return entry and _against(entry, other)


def _against(entry: dict, other: Arm) -> dict | None:
    return next((found for found in entry["against"] if found["arm"] == other["label"]), None)


def headline_context(report: Report) -> int | None:
    """The one context that summary and plots speak of: where most arms have a ratio, the longest of these."""
    entries = [entry for arm in report["arms"] for entry in arm["perplexity"]]
    known = Counter(entry["context"] for entry in entries if entry["ratio"])
    return max(known, key=lambda context: (known[context], context), default=None)


def ranked(report: Report) -> list[Arm]:
    """The arms with a ratio at the headline context, the lowest first; controls left out."""
    context = headline_context(report)
    found = [arm for arm in report["arms"] if ratio(report, arm, context) and not arm["control"]]
    return sorted(found, key=lambda arm: ratio(report, arm, context)["value"])


def speedups(arm: Arm, key: str) -> list[tuple[int, dict]]:
    """(length, spread) for each length where `arm` has the speed-up `key`, by length."""
    found = [(entry["length"], entry[key]) for entry in arm["speed"] if entry[key]]
    return sorted(found, key=lambda pair: pair[0])


def faster_from(arm: Arm, key: str) -> int | None:
    """The length from which on every run of `arm` was faster than softmax, up to the longest measured."""
    start = None
    for length, spread in reversed(speedups(arm, key)):
        if spread["low"] <= 1:
            break
        start = length
    return start


def crossover(arm: Arm, key: str) -> float | None:
    """The length from which on the median of `arm` is faster than softmax, interpolated in log-log between the two
    lengths around it; None where it is faster everywhere, or not at the longest."""
    points = [(length, spread["median"]) for length, spread in speedups(arm, key)]
    for (short, before), (long, after) in reversed(list(zip(points, points[1:], strict=False))):
        if after <= 1:
            return None
        if before <= 1:
            share = log(1 / before) / log(after / before)
            return short * (long / short) ** share
    return None


def best_possible(report: Report, key: str) -> list[tuple[int, dict]]:
    """Amdahl's bound, (length, spread): the speed-up without any attention, which no attention can exceed."""
    arm = without_attention(report)
    return speedups(arm, key) if arm and swapped_layers(arm) == report["model"]["attention_layers"] else []


def without_attention(report: Report) -> Arm | None:
    """The control with no attention in any layer, else in some of them."""
    arms = [arm for arm in report["arms"] if arm["attention"] == "none"]
    return max(arms, key=swapped_layers, default=None)


def swapped_layers(arm: Arm) -> int:
    """How many layers `arm` swaps."""
    return sum(len(group["layers"]) for group in arm["swapped"])


def pareto(report: Report, key: str) -> list[tuple[Arm, float]]:
    """The arms, softmax among them, that no other is both better and faster than at the longest length, with their
    speed over softmax's; slowest first.

    "Better" by the ratio at the headline context, "faster" by the median.
    """
    context, points = headline_context(report), []
    for arm in report["arms"]:
        speeds = speedups(arm, key)
        if arm is reference(report):
            points.append((1.0, 1.0, arm))
        elif ratio(report, arm, context) and speeds and arm["attention"] != "softmax":
            points.append((speeds[-1][1]["median"], ratio(report, arm, context)["value"], arm))
    front, lowest = [], float("inf")
    for speed, value, arm in sorted(points, key=lambda point: (-point[0], point[1])):
        if value < lowest:
            front.append((arm, speed))
            lowest = value
    return front[::-1]


def window_control(report: Report, hybrid: Arm) -> Arm | None:
    """The `window` arm with the window and sinks of `hybrid`; of several, the one trained most like it."""

    def same(arm: Arm) -> bool:
        pairs = [(arm["options"].get(key), hybrid["options"].get(key)) for key in ("window", "sinks")]
        return all(mine == other for mine, other in pairs if None not in (mine, other))

    found = [arm for arm in report["arms"] if arm["attention"] == "window" and same(arm) and same_layers(arm, hybrid)]
    found = [arm for arm in found if any(entry["ratio"] for entry in arm["perplexity"])]
    return min(found, key=lambda arm: abs(arm["training_tokens"] - hybrid["training_tokens"]), default=None)


def linear_control(report: Report, hybrid: Arm) -> Arm | None:
    """The arm that is the linear part of `hybrid` alone; of several, the one trained most like it."""
    name, options = hybrid["attention"].removesuffix("+window"), hybrid["options"]
    found = [
        arm for arm in report["arms"] if arm["attention"] == name and arm["perplexity"] and same_layers(arm, hybrid)
    ]
    found = [arm for arm in found if all(options.get(key, value) == value for key, value in arm["options"].items())]
    return min(found, key=lambda arm: abs(arm["training_tokens"] - hybrid["training_tokens"]), default=None)


def same_layers(arm: Arm, other: Arm) -> bool:
    """Whether the same layers are swapped in both."""
    ours, theirs = ({(g["kind"], i) for g in a["swapped"] for i in g["layers"]} for a in (arm, other))
    return ours == theirs


def with_positions(report: Report) -> list[Arm]:
    """The arms with a likelihood by position at the headline context."""
    context = headline_context(report)
    found = [arm for arm in report["arms"] if arm["status"] == "measured"]
    return [arm for arm in found if (perplexity_at(arm, context) or {"by_position": []})["by_position"]]


def with_training(report: Report) -> bool:
    """Whether the time of a training step was measured."""
    return any(entry["train_s"] for arm in report["arms"] for entry in arm["speed"])


def with_diagnostics(report: Report) -> list[Arm]:
    """The arms whose layers were looked at."""
    return [arm for arm in report["arms"] if arm["diagnostics"]]


def dial(report: Report) -> list[tuple[dict[str, Any], list[Arm]]]:
    """The groups of `relu_power` arms that differ in `p` alone, three or more, and what they share."""
    context = headline_context(report)
    groups: list[tuple[dict[str, Any], list[Arm]]] = []
    for arm in report["arms"]:
        power = arm["options"].get("p")
        usable = isinstance(power, int | float) and not isinstance(power, bool) and power > 0
        measured = arm["status"] == "measured" and ratio(report, arm, context)
        if arm["attention"] != "relu_power" or not usable or not measured:
            continue
        shared = {key: value for key, value in arm["options"].items() if key != "p"}
        shared["training tokens"] = arm["training_tokens"]
        group = next((members for known, members in groups if known == shared), None)
        if group is None:
            groups.append((shared, [arm]))
        else:
            group.append(arm)
    for _, members in groups:
        members.sort(key=lambda arm: arm["options"]["p"])
    return [(shared, members) for shared, members in groups if len({a["options"]["p"] for a in members}) >= 3]
