"""Select from a report what tables, summary and plots need: no words and no formatting."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .. import statistics
from ..statistics import Spread
from .types import Arm, Comparison, Control, Metric, Perplexity, Report, Speed

RETRIEVAL = {"needle": "needles found", "copy": "loss on a text written twice"}  # by task, what it tells


def reference(report: Report) -> Arm | None:
    """Return the softmax arm to which speed-ups and most ratios refer; None where there is none.

    Where there are several, that is one without training.
    """
    arms = [arm for arm in report.arms if arm.attention == "softmax"]
    return min(arms, key=lambda arm: (arm.alignment is not None, bool(arm.training)), default=None)


def contexts(report: Report) -> list[int]:
    """Return every context at which a perplexity was asked for, ascending."""
    return sorted({entry.context for arm in report.arms for entry in arm.perplexity})


def lengths(report: Report) -> list[int]:
    """Return every length at which speed was asked for, ascending."""
    return sorted({entry.length for arm in report.arms for entry in arm.speed})


def perplexity_at(arm: Arm, context: int | None) -> Perplexity | None:
    """Return the perplexity entry of `arm` at `context`; None where there is none."""
    return next((entry for entry in arm.perplexity if entry.context == context), None)


def speed_at(arm: Arm, length: int) -> Speed | None:
    """Return the speed entry of `arm` at `length`; None where there is none."""
    return next((entry for entry in arm.speed if entry.length == length), None)


def metrics(report: Report) -> list[Metric]:
    """Return every metric that was measured, once, as the entry of the first arm that has it."""
    entries: dict[tuple[str, str], Metric] = {}
    for arm in report.arms:
        for entry in arm.metrics:
            entries.setdefault((entry.task, entry.metric), entry)
    return list(entries.values())


def retrieval(report: Report) -> list[tuple[str, list[tuple[int, Metric]]]]:
    """Return for each of the metrics that say how a model recalls its text their lengths, ascending, with an entry.

    Those are the share of needles found, and the loss on a text that is written twice.
    """
    found: dict[str, list[tuple[int, Metric]]] = {}
    for entry in metrics(report):
        task, _, length = entry.task.rpartition(" at ")
        if task in RETRIEVAL and length.isdecimal():
            found.setdefault(task, []).append((int(length), entry))
    return [(task, sorted(entries, key=lambda pair: pair[0])) for task, entries in found.items()]


def metric_of(arm: Arm, like: Metric) -> Metric | None:
    """Return the entry of `arm` for the task and metric of `like`; None where there is none."""
    return next((entry for entry in arm.metrics if (entry.task, entry.metric) == (like.task, like.metric)), None)


def ratio(report: Report, arm: Arm, context: int | None) -> Comparison | None:
    """Return the perplexity of `arm` over that of softmax at `context` with its interval; None where there is none.

    Softmax is `tuned_softmax(report, arm)`, else the reference.
    """
    entry = perplexity_at(arm, context)
    return entry and _beside_softmax(report, arm, entry, "ratio")


def difference(report: Report, arm: Arm, entry: Metric) -> Comparison | None:
    """Return a metric of `arm` less that of softmax with its interval; None where there is none.

    Softmax is the same arm as in `ratio`.
    """
    return _beside_softmax(report, arm, entry, "difference")


def _beside_softmax(report: Report, arm: Arm, entry: Perplexity | Metric, key: str) -> Comparison | None:
    tuned = tuned_softmax(report, arm)
    return _against(entry, tuned) if tuned else getattr(entry, key)


def tuned_softmax(report: Report, arm: Arm) -> Arm | None:
    """Return the trained softmax with which the quality of a trained `arm` is compared: the one trained most.

    Text teaches its style to every model, so the softmax beside a trained arm has to be trained too. None where there
    is no such softmax, and for softmax and untrained arms: these are compared with the reference.
    """
    if not arm.training or arm.attention == "softmax":
        return None
    arms = [other for other in report.arms if other.attention == "softmax" and other.training]
    arms = [other for other in arms if any(_against(entry, other) for entry in [*arm.perplexity, *arm.metrics])]
    return max(arms, key=lambda other: other.training_tokens, default=None)


def against(arm: Arm, other: Arm, context: int | None) -> Comparison | None:
    """Return the perplexity of `arm` over that of `other` at `context`, compared block by block.

    None where the two were not compared.
    """
    entry = perplexity_at(arm, context)
    return entry and _against(entry, other)


def _against(entry: Perplexity | Metric, other: Arm) -> Comparison | None:
    return next((compared for compared in entry.against if compared.arm == other.label), None)


def headline_context(report: Report) -> int | None:
    """Return the one context on which summary and plots report: where most arms have a ratio, the longest of these."""
    entries = [entry for arm in report.arms for entry in arm.perplexity]
    known = Counter(entry.context for entry in entries if entry.ratio)
    return max(known, key=lambda context: (known[context], context), default=None)


def headline(report: Report, arm: Arm) -> Comparison | None:
    """Return the one number that ranks `arm`: the ratio at the headline context, else the first metric's difference."""
    context = headline_context(report)
    if context is not None:
        return ratio(report, arm, context)
    first = next(iter(metrics(report)), None)
    entry = metric_of(arm, first) if first else None
    return difference(report, arm, entry) if entry else None


def headline_words(report: Report) -> str:
    """Return in words what `headline` measures."""
    context = headline_context(report)
    if context is None:
        first = metrics(report)[0]
        return " ".join(f"{first.metric} of {first.task}, less softmax's".split())
    control = "softmax's" if report.kind == "tradeoff" else "its control's"
    return f"perplexity over {control} at context {context:,}"


def ranked(report: Report) -> list[Arm]:
    """Return the arms with a headline number, the best quality first; controls left out."""
    first = next(iter(metrics(report)), None)
    lower = headline_context(report) is not None or (first is not None and not first.higher_is_better)
    scores = [(headline(report, arm), arm) for arm in report.arms if not arm.control]
    known = [(compared.value, arm) for compared, arm in scores if compared]
    return [arm for _, arm in sorted(known, key=lambda pair: pair[0] if lower else -pair[0])]


def speedups(arm: Arm, key: str) -> list[tuple[int, Spread]]:
    """Return (length, spread) for each length where `arm` has the speed-up `key`, by length."""
    found = [(entry.length, getattr(entry, key)) for entry in arm.speed if getattr(entry, key)]
    return sorted(found, key=lambda pair: pair[0])


def bound(report: Report, arm: Arm, key: str, length: int) -> Spread | None:
    """Return Amdahl's bound on `arm`: the speed-up with no attention at all in the layers that the arm swaps.

    An arm without attention in more layers counts too. None where there is no such arm.
    """
    arms = [other for other in report.arms if other.attention == "none" and _places(arm) <= _places(other)]
    found = [dict(speedups(other, key)).get(length) for other in arms if other is not arm]
    return max((spread for spread in found if spread), key=lambda spread: spread.median, default=None)


def is_noise(report: Report, arm: Arm, key: str, length: int) -> bool:
    """Return whether `arm` was measured faster than without any attention: the number then is noise of the machine."""
    own, most = dict(speedups(arm, key)).get(length), bound(report, arm, key, length)
    return own is not None and most is not None and own.median > most.median


def real_speedups(report: Report, arm: Arm, key: str) -> list[tuple[int, Spread]]:
    """Return `speedups` without those that are noise."""
    return [pair for pair in speedups(arm, key) if not is_noise(report, arm, key, pair[0])]


def faster(spread: Spread) -> bool:
    """Return whether every run was faster than softmax, and the runs are enough to say so."""
    return spread.enough and spread.low > 1


def slower(spread: Spread) -> bool:
    """Return whether every run was slower than softmax, and the runs are enough to say so."""
    return spread.enough and spread.high < 1


def faster_from(report: Report, arm: Arm, key: str) -> int | None:
    """Return the length from which on every run of `arm` was faster than softmax, up to the longest measured."""
    lows = [
        (length, spread.low if spread.enough and not is_noise(report, arm, key, length) else 0.0)
        for length, spread in speedups(arm, key)
    ]
    start = statistics.crossover(lows, interpolated=False)
    return None if start is None else int(start)


def crossover(arm: Arm, key: str) -> float | None:
    """Return the length from which on the median of `arm` is faster than softmax.

    None where the arm is faster from the shortest length on, or nowhere.
    """
    medians = [(length, spread.median) for length, spread in speedups(arm, key)]
    start = statistics.crossover(medians)
    return None if start is None or start == medians[0][0] else start


def few_rounds(spreads: Sequence[Spread | None]) -> list[int]:
    """Return the numbers of rounds that are too few to speak of their spread, ascending."""
    return sorted({spread.runs for spread in spreads if spread and not spread.enough})


def best_possible(report: Report, key: str) -> list[tuple[int, Spread]]:
    """Return Amdahl's bound as (length, spread): the speed-up without any attention, which no attention can exceed."""
    arm = without_attention(report)
    return speedups(arm, key) if arm and swapped_layers(arm) == report.model.attention_layers else []


def without_attention(report: Report) -> Arm | None:
    """Return the control with no attention in any layer, else in some of them."""
    arms = [arm for arm in report.arms if arm.attention == "none"]
    return max(arms, key=swapped_layers, default=None)


def swapped_layers(arm: Arm) -> int:
    """Return how many layers `arm` swaps, in all or some of their key/value groups."""
    return len({(kind, int(place.partition(".")[0])) for kind, place in _places(arm)})


def swapped_share(report: Report, arm: Arm) -> float:
    """Return the part of the key/value groups of the model that `arm` swaps."""
    per_layer = max(1, report.model.num_key_value_heads)
    groups = sum(len(group.layers) * per_layer + len(group.groups) for group in arm.swapped)
    return groups / max(1, report.model.attention_layers * per_layer)


def pareto(report: Report, key: str) -> list[tuple[Arm, float]]:
    """Return the arms, softmax among them, that no other arm beats in both quality and speed; slowest first.

    Quality is the ratio at the headline context, speed the median speed-up at the longest length. Each arm is returned
    with its speed.
    """
    context, points = headline_context(report), []
    for arm in report.arms:
        speeds = real_speedups(report, arm, key)
        if arm is reference(report):
            points.append((1.0, 1.0, arm))
        elif ratio(report, arm, context) and speeds and arm.attention != "softmax":
            points.append((speeds[-1][1].median, ratio(report, arm, context).value, arm))
    front, lowest = [], float("inf")
    for speed, value, arm in sorted(points, key=lambda point: (-point[0], point[1])):
        if value < lowest:
            front.append((arm, speed))
            lowest = value
    return front[::-1]


def window_control(report: Report, hybrid: Arm) -> Arm | None:
    """Return the `window` arm with the window and sinks of `hybrid`; of several, the one trained most like it.

    A window that leaves groups on softmax is a plan, and no control.
    """

    def same(arm: Arm) -> bool:
        pairs = [(arm.options.get(key), hybrid.options.get(key)) for key in ("window", "sinks")]
        return all(mine == other for mine, other in pairs if None not in (mine, other))

    windows = [arm for arm in report.arms if arm.attention == "window" and arm.control and arm is not hybrid]
    found = [arm for arm in windows if same(arm) and same_layers(arm, hybrid)]
    found = [arm for arm in found if any(entry.ratio for entry in arm.perplexity)]
    return min(found, key=lambda arm: abs(arm.training_tokens - hybrid.training_tokens), default=None)


def linear_control(report: Report, hybrid: Arm) -> Arm | None:
    """Return the arm that is the linear part of `hybrid` alone; of several, the one trained most like it."""
    name, options = hybrid.attention.removesuffix("+window"), hybrid.options
    found = [arm for arm in report.arms if arm.attention == name and arm.perplexity and same_layers(arm, hybrid)]
    found = [arm for arm in found if all(options.get(key, value) == value for key, value in arm.options.items())]
    return min(found, key=lambda arm: abs(arm.training_tokens - hybrid.training_tokens), default=None)


def controls(report: Report, arm: Arm) -> list[tuple[Control, Arm | None]]:
    """Return the controls of equal state and of equal time of `arm`, with their arms; None where there is none."""
    arms = {other.label: other for other in report.arms}
    return [(control, arms.get(control.arm or "")) for control in arm.controls]


def beside_control(arm: Arm, control: Arm, context: int | None) -> Comparison | None:
    """Return the perplexity of `arm` over that of a control at `context`, block by block; None where there is none."""
    entry = perplexity_at(arm, context)
    if entry and entry.ratio and entry.ratio.arm == control.label:
        return entry.ratio
    return entry and _against(entry, control)


def better_control(report: Report, arm: Arm) -> tuple[Control, Arm, Comparison] | None:
    """Return which of the controls of equal state and equal time has the better quality, with `arm` beside it.

    Quality is the perplexity at the headline context. None where no such control was measured.
    """
    context = headline_context(report)
    pairs = [(control, other) for control, other in controls(report, arm) if other]
    found = [(control, other, beside_control(arm, other, context)) for control, other in pairs]
    known = [(control, other, compared) for control, other, compared in found if compared]
    return max(known, key=lambda each: each[2].value, default=None)


def same_layers(arm: Arm, other: Arm) -> bool:
    """Return whether the same layers and groups are swapped in both arms."""
    return _places(arm) == _places(other)


def _places(arm: Arm) -> set[tuple[str, str]]:
    return {(group.kind, place) for group in arm.swapped for place in (*map(str, group.layers), *group.groups)}


def positions_context(report: Report) -> int | None:
    """Return the context whose positions are drawn: the longest of those where most arms have a likelihood by position.

    It may be longer than the headline context: a mean over few blocks has no interval, but shows where an arm breaks.
    """
    entries = [entry for arm in report.arms if arm.status == "measured" for entry in arm.perplexity]
    known = Counter(entry.context for entry in entries if entry.by_position)
    return max(known, key=lambda context: (known[context], context), default=None)


def with_positions(report: Report) -> list[Arm]:
    """Return the arms with a likelihood by position at `positions_context`."""
    context = positions_context(report)
    found = [arm for arm in report.arms if arm.status == "measured"]
    return [arm for arm in found if (entry := perplexity_at(arm, context)) and entry.by_position]


def with_training(report: Report) -> bool:
    """Return whether the time of a training step was measured."""
    return any(entry.train_s for arm in report.arms for entry in arm.speed)


def with_diagnostics(report: Report) -> list[Arm]:
    """Return the arms with measurements of their layers."""
    return [arm for arm in report.arms if arm.diagnostics]


def dial(report: Report) -> list[tuple[dict[str, Any], list[Arm]]]:
    """Return the groups of three or more `relu_power` arms that differ in `p` alone, each after what its arms share."""
    context = headline_context(report)
    groups: list[tuple[dict[str, Any], list[Arm]]] = []
    for arm in report.arms:
        power = arm.options.get("p")
        usable = isinstance(power, int | float) and not isinstance(power, bool) and power > 0
        measured = arm.status == "measured" and ratio(report, arm, context)
        if arm.attention != "relu_power" or not usable or not measured:
            continue
        shared = {key: value for key, value in arm.options.items() if key != "p"}
        shared["training tokens"] = arm.training_tokens
        group = next((members for known, members in groups if known == shared), None)
        if group is None:
            groups.append((shared, [arm]))
        else:
            group.append(arm)
    for _, members in groups:
        members.sort(key=lambda arm: arm.options["p"])
    return [(shared, members) for shared, members in groups if len({a.options["p"] for a in members}) >= 3]
