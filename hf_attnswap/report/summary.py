"""Write the account of a report in words, computed from the report alone."""

from ..statistics import MIN_ROUNDS, Spread, lacking
from . import facts, verdicts
from .tables import speedup_words
from .text import count, difference, interval, listing, number, plain
from .types import Arm, Comparison, Report

_DOING = {"prefill_speedup": "Prefill", "forward_speedup": "Forward pass", "decode_speedup": "Decoding"}


def summary(report: Report) -> list[str]:
    """Return paragraphs on quality, speed, cost class, `none`, the hybrids, and what was not measured."""
    doing = _DOING | ({"train_speedup": "Training step"} if facts.with_training(report) else {})
    measured = {key for key in doing for arm in report.arms if facts.speedups(arm, key)}
    reads_alone = "forward_speedup" in measured or report.kind != "tradeoff"
    expected = set() if reads_alone else {"prefill_speedup", "decode_speedup"}
    speed = [_speed(report, key, name) for key, name in doing.items() if key in measured | expected]
    quality = [_quality(report)] if facts.contexts(report) or not facts.metrics(report) else []
    attention = [_cost(report), *_growth(report), _none(report), *_bound(report), *_noise(report)]
    attention += [*_controls(report), *_hybrids(report)]
    return [*quality, *verdicts.paragraph(report), *speed, *attention, *_unmeasured(report)]


def _name(arm: Arm) -> str:
    return plain(arm.label)


def _names(arms: list[Arm]) -> str:
    return listing([_name(arm) for arm in arms])


def _training(arm: Arm) -> str:
    tokens = arm.training_tokens
    how = "training" if arm.training else "alignment"
    return f"after {how} on {count(tokens)} tokens" if tokens else "with no training"


def _perplexity(value: Comparison, control: str = "softmax's") -> str:
    said = f"{number(value.value)} times {control} perplexity"
    if value.low is None or value.high is None:
        return said
    return f"{said} (95 % interval {number(value.low)} to {number(value.high)})"


def _kept(report: Report, arm: Arm, context: int | None) -> str:
    """Return in words the perplexity of an arm beside the softmax with which it is compared."""
    tuned, said = facts.tuned_softmax(report, arm), _perplexity(facts.ratio(report, arm, context))
    if tuned is None:
        return said
    return f"{said}, with a softmax that was trained too, on {count(tuned.training_tokens)} tokens"


def _quality(report: Report) -> str:
    context = facts.headline_context(report)
    softmax = facts.reference(report)
    entry = facts.perplexity_at(softmax, context) if softmax else None
    if context is None or not entry or entry.perplexity is None:
        return "Quality: no perplexity was measured together with softmax's, so the arms cannot be compared."
    start = f"Quality: at context {count(context)}, softmax has perplexity {number(entry.perplexity)}."
    ranked = facts.ranked(report)
    if not ranked:
        return f"{start} No arm other than controls has a perplexity there."
    best = ranked[0]
    value = facts.ratio(report, best, context)
    said = [start, f"{_name(best)} keeps most quality: {_kept(report, best, context)}, {_training(best)}."]
    if value and value.verdict == "no measurable difference":
        said.append("That is no measurable difference from softmax.")
    compared = [(arm, facts.against(arm, best, context)) for arm in ranked[1:]]
    ties = [arm for arm, found in compared if found and found.verdict == "no measurable difference"]
    if ties:
        said.append(f"Between it and {_names(ties)} there is no measurable difference, so their order is open.")
    cheaper = next((arm for arm in ranked if arm.cost_class != "quadratic"), None)
    if cheaper and cheaper is not best:
        said.append(
            f"Of the arms with less than quadratic cost, {_name(cheaper)} keeps most: "
            f"{_kept(report, cheaper, context)}, {_training(cheaper)}."
        )
    return " ".join(said)


def _speed(report: Report, key: str, name: str) -> str:
    swapped = [arm for arm in report.arms if arm.attention != "softmax"]
    measured = [(arm, length, spread) for arm in swapped for length, spread in facts.real_speedups(report, arm, key)]
    if not measured:
        return f"{name}: no speed-up over softmax was measured."
    few = facts.few_rounds([spread for _, _, spread in measured])
    arms = [item for item in measured if not item[0].control]
    if few:
        arm, length, spread = max(arms or measured, key=lambda item: item[2].median)
        said = f"{lacking('to be sure of a speed-up', MIN_ROUNDS, 'rounds', few[-1])}".replace("needs", "takes")
        return f"{name}: {said}; the highest median is {_name(arm)}, {speedup_words(spread)} at {count(length)}."
    said = _first_faster(report, arms, key) if arms else "no arm other than controls was measured."
    controls = [arm for arm in swapped if arm.control and facts.faster_from(report, arm, key)]
    if controls:
        each = [f'"{_name(arm)}" from {count(facts.faster_from(report, arm, key))} tokens on' for arm in controls]
        said += f" Of the controls, these are faster than softmax: {listing(each)}."
    return f"{name}: {said}"


def _first_faster(report: Report, measured: list[tuple[Arm, int, Spread]], key: str) -> str:
    """Return in words from which length on an arm is faster than softmax in every run; else the nearest to that."""
    lasting = [item for item in measured if item[1] == facts.faster_from(report, item[0], key)]
    if lasting:
        arm, length, spread = min(lasting, key=lambda item: (item[1], -item[2].median))
        others: dict[int, list[Arm]] = {}
        for other, start, _ in sorted(lasting, key=lambda item: item[1]):
            if other is not arm:
                others.setdefault(start, []).append(other)
        also = "; ".join(f"from {count(start)} on also {_names(arms)}" for start, arms in others.items())
        also = f" Faster {also}." if also else ""
        start = f"from {count(length)} tokens on, {_name(arm)} is faster than softmax in every run"
        crossing = facts.crossover(arm, key)
        also += f" The medians cross at about {count(round(crossing))} tokens (interpolated)." if crossing else ""
        return f"{start}, {speedup_words(spread)} at {count(length)}.{also}"
    lengths = sorted({length for _, length, _ in measured})
    tried = " and ".join(count(length) for length in dict.fromkeys((lengths[0], lengths[-1])))
    tried = f"measured between {tried} tokens" if len(lengths) > 1 else f"measured at {tried} tokens"
    single = [item for item in measured if item[2].low > 1]
    arm, length, spread = max(single or measured, key=lambda item: item[2].median)
    best = f"{_name(arm)}, {speedup_words(spread)} at {count(length)}"
    if single:
        return f"nothing stays faster than softmax up to the longest length ({tried}); at one length {best}."
    return f"nothing is faster than softmax in every run at any length ({tried}); the nearest is {best}."


def _cost(report: Report) -> str:
    layers = report.model.attention_layers
    partial = [arm for arm in report.arms if 0 < facts.swapped_layers(arm) < layers]
    whole = [arm for arm in report.arms if arm not in partial]

    def attentions(cost_class: str) -> str:
        arms = [arm for arm in whole if arm.cost_class == cost_class]
        names = dict.fromkeys(plain(arm.attention) for arm in arms)
        names.pop("softmax", None)
        return f"here {listing(list(names))}" if names else "no arm here"

    return (
        "Cost: an activation applied to the scores, as in relu(q.k), stays O(n^2) in the length n, like "
        f"softmax ({attentions('quadratic')}). Linear arms are O(n): no activation, one applied to q and k "
        f"separately, or keys limited to a window ({attentions('linear')})."
        + (f" With softmax in the layers that are not swapped, {_names(partial)} stay O(n^2) too." if partial else "")
    )


def _growth(report: Report) -> list[str]:
    """Return in words the exponents of the prefill's time, for softmax and the arm of the best quality.

    The table has the exponents of the other arms.
    """
    ranked = facts.ranked(report)
    cheaper = [arm for arm in ranked if arm.cost_class != "quadratic"]
    told = [arm for arm in (facts.reference(report), *ranked[:1], *cheaper[:1]) if arm and arm.growth.get("prefill_s")]
    arms = list({arm.label: arm for arm in told}.values())
    if not arms:
        return []
    said = []
    for arm in arms:
        grown = arm.growth["prefill_s"]
        bounds = "" if grown.low is None else f" ({number(grown.low)} to {number(grown.high)})"
        said.append(f"n^{number(grown.exponent)} for {_name(arm)}{bounds}")
    lengths = facts.lengths(report)
    where = f"between {count(lengths[0])} and {count(lengths[-1])} tokens, the rest of the model included"
    return [f"Growth: the time of the prefill grows as {listing(said)}, measured {where} (95 % intervals)."]


def _bound(report: Report) -> list[str]:
    """Return in words Amdahl's bound: what no attention at all would gain."""
    for key, doing in (("prefill_speedup", "prefill"), ("forward_speedup", "forward pass")):
        measured = facts.best_possible(report, key)
        if measured:
            length, spread = measured[-1]
            share = 1 - 1 / spread.median
            if share <= 0:
                said = f"at {count(length)} tokens the model is no faster without any attention, so no swap can gain."
                return [f"Bound: {said}"]
            return [
                f"Bound: at {count(length)} tokens attention is {100 * share:.0f} % of the time of the {doing}, so no "
                f"swap can be more than {speedup_words(spread)}."
            ]
    return []


def _noise(report: Report) -> list[str]:
    """Return in words what was measured faster than is possible."""
    noisy = {
        _name(arm): None
        for arm in report.arms
        for key in (*_DOING, "train_speedup")
        for length, _ in facts.speedups(arm, key)
        if facts.is_noise(report, arm, key, length)
    }
    if not noisy:
        return []
    return [f"Noise: {listing(list(noisy))} came out faster somewhere than without any attention, which none can be."]


def _none(report: Report) -> str:
    arm, layers = facts.without_attention(report), report.model.attention_layers
    what, where = 'The control "none" (no attention at all)', "attention at all"
    if arm and facts.swapped_layers(arm) < layers:
        what = f'The control "{_name(arm)}" (no attention in {facts.swapped_layers(arm)} of {layers} layers)'
        where = "attention in these layers"
    if arm is None:
        return f"{what} is not among the arms, so how much this text needs attention is not known."
    value = facts.headline(report, arm)
    if value is None:
        why = plain(arm.reason or "its perplexity was not measured")
        return f"{what} has no ratio to softmax ({why})."
    if facts.headline_context(report) is None:
        said = f"{facts.headline_words(report)}, of {difference(value)}"
    else:
        said = _perplexity(value)
    return f"{what} has {said}: this is how much this text needs {where}."


def _controls(report: Report) -> list[str]:
    return [_control(report, arm) for arm in report.arms if arm.controls and arm.status == "measured"]


def _control(report: Report, arm: Arm) -> str:
    """Return in words how an arm compares with its controls of equal state and of equal time, and with the better."""
    said = []
    for control, other in facts.controls(report, arm):
        named = f"of equal {control.equal} {_name(other) if other else 'none'}"
        named += f" ({plain(control.note)})" if control.note else ""
        words = [_verdicts(report, arm, other), verdicts.against(arm, other)] if other else []
        said.append(": ".join(filter(None, [named, ", ".join(filter(None, words))])))
    best, end = facts.better_control(report, arm), ""
    if best:
        end = f" Against the better of them, {_name(best[1])}: {best[2].verdict or 'too few blocks to say'}."
    return f"Controls of {_name(arm)}, plain windows: {'; '.join(said)}.{end}"


def _hybrids(report: Report) -> list[str]:
    hybrids = [arm for arm in report.arms if arm.attention.endswith("+window")]
    return [_hybrid(report, arm) for arm in hybrids if any(entry.ratio for entry in arm.perplexity)]


def _hybrid(report: Report, arm: Arm) -> str:
    said = []
    for control, what in (
        (facts.window_control(report, arm), "the control {}"),
        (facts.linear_control(report, arm), "its linear part alone, {}"),
    ):
        words = _verdicts(report, arm, control) if control else ""
        if not words:
            continue
        if arm.training_tokens != control.training_tokens:
            words += f" (the hybrid {_training(arm)}, the control {_training(control)})"
        words = ", ".join(filter(None, [words, verdicts.against(arm, control)]))
        said.append(f"against {what.format(_name(control))}: {words}")
    if not said or not said[0].startswith("against the control"):
        said.insert(0, "was compared with no window control of the same window and sinks")
    return f"Hybrid {_name(arm)} {'; '.join(said)}."


def _verdicts(report: Report, arm: Arm, control: Arm) -> str:
    """Return in words what the paired differences allow to say, by context."""
    found: dict[str, list[str]] = {}
    for context in facts.contexts(report):
        compared = facts.beside_control(arm, control, context)
        if compared:
            found.setdefault(compared.verdict or "too few blocks to say", []).append(
                f"{count(context)}, {interval(compared)}"
            )
    return listing([f"{verdict} at context {listing(at)}" for verdict, at in found.items()])


def _unmeasured(report: Report) -> list[str]:
    said = []
    for status in ("failed", "not measured"):
        arms = [arm for arm in report.arms if arm.status == status]
        if arms:
            said.append(f"{status.capitalize()}: {_names(arms)}; the table has the reasons.")
    return said
