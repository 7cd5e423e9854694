"""The report in four lines: what it costs, what it gains, from which length on, beside which controls."""

from . import facts
from .facts import Arm, Report
from .text import count, interval, listing, plain, times

_DOING = {"prefill_speedup": "prefill", "decode_speedup": "decoding"}


def short(report: Report) -> list[tuple[str, str]]:
    """(what, words) of the arms that keep most: of all, and of those with less than quadratic cost. Controls left out.

    Empty where no arm has a perplexity beside softmax's.
    """
    context, ranked = facts.headline_context(report), facts.ranked(report)
    if not ranked:
        return []
    cheaper = [arm for arm in ranked if arm["cost_class"] != "quadratic"]
    arms = ranked[:1] + [arm for arm in cheaper[:1] if arm is not ranked[0]]
    costs = [_cost(report, arm, context) for arm in arms]
    where = f"perplexity over softmax's at context {count(context)}"
    said = [("Costs", f"{where}: {listing(costs)}.")]
    lengths = facts.lengths(report)
    if lengths:
        gains = [f"{_named(arm)}: {_gains(report, arm, lengths[-1])}" for arm in arms]
        said.append(("Gains", f"at {count(lengths[-1])} tokens, {'; '.join(gains)}."))
        said.append(("Pays", f"{'; '.join(_pays(arm, lengths) for arm in arms)}."))
    beside = _beside(report, arms[-1], context)
    return [*said, ("Controls", f"{beside}.")] if beside else said


def _cost(report: Report, arm: Arm, context: int | None) -> str:
    tuned = facts.tuned_softmax(report, arm)
    said = f"{interval(facts.ratio(report, arm, context), 'value')} with {_named(arm)}{_after(arm)}"
    return f"{said} beside a softmax trained on {count(tuned['training_tokens'])} tokens" if tuned else said


def _named(arm: Arm) -> str:
    return plain(arm["label"])


def _after(arm: Arm) -> str:
    """The cost class, and the training."""
    cost = {"quadratic": "O(n^2)", "linear": "O(n)", "constant": "O(1)"}[arm["cost_class"]]
    tokens = arm["training_tokens"]
    return f" ({cost}, {f'trained on {count(tokens)} tokens' if tokens else 'untrained'})"


def _gains(report: Report, arm: Arm, length: int) -> str:
    entry, softmax = facts.speed_at(arm, length), facts.speed_at(facts.reference(report) or arm, length)
    if not entry or not softmax:
        return "not measured"
    said = [f"{name} {times(entry[key]['median'])} as fast" for key, name in _DOING.items() if entry[key]]
    ours, theirs = entry["cache_mib"], softmax["cache_mib"]
    if ours != theirs and None not in (ours, theirs):
        said.append(f"{ours:,.1f} MiB of cache in place of {theirs:,.1f}")
    return ", ".join(said) or "not measured"


def _pays(arm: Arm, lengths: list[int]) -> str:
    starts = {name: facts.faster_from(arm, key) for key, name in _DOING.items() if facts.speedups(arm, key)}
    if not starts:
        return f"{_named(arm)}: no speed-up was measured"
    paying = [f"{name} from {count(start)} tokens on" for name, start in starts.items() if start]
    if len(paying) == 2 and len(set(starts.values())) == 1:
        paying = [f"{listing(list(starts))} from {count(starts['prefill'])} tokens on"]
    if paying:
        return f"{_named(arm)}: {listing(paying)}"
    return f"{_named(arm)}: at no length up to {count(lengths[-1])}"


def _beside(report: Report, arm: Arm, context: int | None) -> str:
    """What the controls say of it."""
    said = []
    for control, what in (
        (facts.window_control(report, arm), "the window alone"),
        (facts.without_attention(report), "no attention"),
    ):
        value = control and facts.ratio(report, control, context)
        if value:
            against = facts.against(arm, control, context)
            verdict = f", {_named(arm)} is {_than(against['verdict'])}" if against else ""
            said.append(f"{what} has {interval(value, 'value')}{verdict}")
    return "; ".join(said)


def _than(verdict: str) -> str:
    return verdict if verdict in ("better", "worse") else "not measurably different"
