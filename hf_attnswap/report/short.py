"""Sum a report up in three sentences, and in four lines: costs, gains, from which length on, beside which controls."""

from collections.abc import Callable

from ..statistics import MIN_ROUNDS, Spread, lacking
from . import facts
from .text import count, difference, interval, listing, number, plain, times
from .types import Arm, Report

DOING = {"prefill_speedup": "prefill", "forward_speedup": "the forward pass", "decode_speedup": "decoding"}
CLASSES = {"quadratic": "O(n^2)", "linear": "O(n)", "constant": "O(1)"}


def short(report: Report) -> list[tuple[str, str]]:
    """Return (what, words) on the arms of the best quality: of all, and of those with less than quadratic cost.

    A loss of quality or of speed is a cost; a gain is what is better in every run. Controls are left out. The list is
    empty where no arm was compared with softmax.
    """
    arms = leading(report)
    if not arms:
        return []
    costs = [f"{facts.headline_words(report)}: {listing([_cost(report, arm) for arm in arms])}"]
    lengths = facts.lengths(report)
    said = []
    if lengths:
        at = f"at {count(lengths[-1])} tokens"
        losses = _each(arms, lambda arm: _changes(report, arm, lengths[-1], facts.slower, gained=False))
        costs += [f"{at}, {losses}"] if losses else []
        gains = _each(arms, lambda arm: _changes(report, arm, lengths[-1], facts.faster, gained=True))
        said.append(("Gains", f"{at}, {gains or 'nothing that was measured'}."))
        said.append(("Pays", f"{'; '.join(_pays(report, arm, lengths) for arm in arms)}."))
    beside = "; ".join(dict.fromkeys(words for arm in _controlled(arms) for words in _beside(report, arm)))
    recalls = [("Recalls", f"{'; '.join(retrieval(report, arms))}.")] if facts.retrieval(report) else []
    said = [("Costs", f"{'; '.join(costs)}."), *recalls, *said]
    return [*said, *([("Controls", f"{beside}.")] if beside else [])]


def opening(report: Report) -> list[str]:
    """Return three sentences on the arm of the best quality: what it keeps, what it gains and loses, beside controls.

    The list is empty where no arm was compared with softmax.
    """
    arms, lengths = leading(report)[:1], facts.lengths(report)
    if not arms:
        return []
    (arm,) = arms
    measured = f"{facts.headline_words(report)}: {score(report, arm)}{_few(report, arm)}"
    said = [f"{plain(arm.label)} ({_how(report, arm)}) keeps most; {measured}."]
    if lengths:
        gains, losses = (
            _changes(report, arm, lengths[-1], counts, gained)
            for counts, gained in ((facts.faster, True), (facts.slower, False))
        )
        lost = f", and loses {losses}" if losses else ""
        said.append(f"At {count(lengths[-1])} tokens it gains {gains or 'nothing that was measured'}{lost}.")
    beside = _beside(report, arm)[:1]
    held = [*beside, *retrieval(report, arms)]
    return [*said, *([f"{'Beside its controls' if beside else 'In tasks'}: {'; '.join(held)}."] if held else [])]


def retrieval(report: Report, arms: list[Arm]) -> list[str]:
    """Return in words what softmax and `arms` recall, and of how many items: one text for each task."""
    softmax, said = facts.reference(report), []
    for task, entries in facts.retrieval(report):
        values = []
        for arm in [*([softmax] if softmax else []), *arms]:
            own = [facts.metric_of(arm, entry) for _, entry in entries]
            told = ["-" if found is None or found.value is None else number(found.value) for found in own]
            values.append(f"{plain(arm.label)} {', '.join(told)}")
        items = sorted({entry.items for _, entry in entries})
        of = f"{count(items[0])} items" if len(items) == 1 else f"{count(items[0])} to {count(items[-1])} items"
        at = listing([count(length) for length, _ in entries])
        said.append(
            f"{facts.RETRIEVAL[task]} at {at} tokens ({of}{' each' if len(entries) > 1 else ''}): {'; '.join(values)}"
        )
    return said


def _controlled(arms: list[Arm]) -> list[Arm]:
    """Return the arms whose controls are told: those with a state, and the last one in any case."""
    return [arm for arm in arms if arm.controls or arm is arms[-1]]


def leading(report: Report) -> list[Arm]:
    """Return the arm of the best quality, and the best of those below quadratic cost where that is another arm."""
    ranked = facts.ranked(report)
    cheaper = [arm for arm in ranked if arm.cost_class != "quadratic"]
    return ranked[:1] + [arm for arm in cheaper[:1] if arm is not ranked[0]]


def score(report: Report, arm: Arm) -> str:
    """Return the headline number of an arm beside softmax with its interval, in words."""
    compared = facts.headline(report, arm)
    if compared is None:
        return "not compared"
    return interval(compared) if facts.headline_context(report) else difference(compared)


def _few(report: Report, arm: Arm) -> str:
    """Return on how few items the headline number of an arm rests; empty where they are enough."""
    compared = facts.headline(report, arm)
    unit = "blocks" if facts.headline_context(report) else "items"
    return f" on {count(compared.items)} {unit}" if compared and compared.few else ""


def _cost(report: Report, arm: Arm) -> str:
    tuned = facts.tuned_softmax(report, arm)
    said = f"{score(report, arm)}{_few(report, arm)} with {plain(arm.label)} ({_how(report, arm)})"
    return f"{said} beside a softmax trained on {count(tuned.training_tokens)} tokens" if tuned else said


def _how(report: Report, arm: Arm) -> str:
    """Return the cost of an arm and its training: "O(n), untrained"."""
    trained = f"trained on {count(arm.training_tokens)} tokens" if arm.training_tokens else "untrained"
    return f"{CLASSES[arm.cost_class]}, {'trained as softmax was' if report.kind == 'classification' else trained}"


def _each(arms: list[Arm], words: Callable[[Arm], str]) -> str:
    said = [(plain(arm.label), words(arm)) for arm in arms]
    return "; ".join(f"{label}: {what}" for label, what in said if what)


def _changes(report: Report, arm: Arm, length: int, counts: Callable[[Spread], bool], gained: bool) -> str:
    """Return in words the speeds for which `counts` holds, and the cache where it is smaller (gained) or larger."""
    entry, softmax = facts.speed_at(arm, length), facts.speed_at(facts.reference(report) or arm, length)
    said = []
    for key, name in DOING.items():
        spread = getattr(entry, key, None)
        if spread and counts(spread) and not facts.is_noise(report, arm, key, length):
            said.append(f"{name} {times(spread.median)} as fast")
    ours, theirs = getattr(entry, "cache_mib", None), getattr(softmax, "cache_mib", None)
    if None not in (ours, theirs) and (ours < theirs if gained else ours > theirs):
        said.append(f"{ours:,.1f} MiB of cache in place of {theirs:,.1f}")
    return ", ".join(said)


def _pays(report: Report, arm: Arm, lengths: list[int]) -> str:
    label, measured = plain(arm.label), {key: facts.speedups(arm, key) for key in DOING}
    if not any(measured.values()):
        return f"{label}: no speed-up was measured"
    few = facts.few_rounds([spread for pairs in measured.values() for _, spread in pairs])
    if few:
        return f"{label}: open, {lacking('it', MIN_ROUNDS, 'rounds', few[-1])}"
    starts = {name: facts.faster_from(report, arm, key) for key, name in DOING.items() if measured[key]}
    paying = [f"{name} from {count(start)} tokens on" for name, start in starts.items() if start]
    if len(paying) == 2 and len(set(starts.values())) == 1:
        paying = [f"{listing(list(starts))} from {count(min(filter(None, starts.values())))} tokens on"]
    return f"{label}: {listing(paying)}" if paying else f"{label}: at no length up to {count(lengths[-1])}"


def _beside(report: Report, arm: Arm) -> list[str]:
    """Return in words how an arm compares with the controls."""
    said, context = [], facts.headline_context(report)
    best = facts.better_control(report, arm)
    what = f"{plain(best[1].label)}, the better of its windows of equal state and of equal time," if best else ""
    shown = [(best[1], what)] if best else [(facts.window_control(report, arm), "the window alone")]
    for control, what in (*shown, (facts.without_attention(report), "no attention")):
        if control and (facts.headline(report, control) or best):
            against = facts.beside_control(arm, control, context)
            verdict = f", {plain(arm.label)} is {_than(against.verdict)}" if against else ""
            said.append(f"{what} has {score(report, control)}{verdict}")
    return said


def _than(verdict: str | None) -> str:
    if verdict is None:
        return "compared on too few items to say"
    return verdict if verdict in ("better", "worse") else "not measurably different"
