"""Say on a card what a report measured of a conversion."""

import shlex
from dataclasses import replace
from typing import Any

from ..report import facts, tables
from ..report.details import details
from ..report.table import Column, Table, escape
from ..report.text import count, difference, interval, number, plain, times
from ..report.types import Arm, Comparison, Perplexity, Report, Stage


def data_name(report: Report) -> str:
    """Return the name of the data on which quality was measured."""
    return plain(report.title if report.kind == "classification" else report.data.evaluation)


def content(report: Report, arm: Arm, reproduce: str | None) -> dict[str, Any]:
    """Return what the template of the card shows of `arm`, by name.

    Args:
        reproduce: the command that trains the conversion again; None where none is known.
    """
    beside = _beside(report, arm)
    name = report.model.name
    return {
        "file": name if name.endswith(".gguf") else None,
        "stages": _stages(report, arm) if arm.training else None,
        "training": _training(report, arm),
        "quality": "\n".join([*_perplexities(report, arm), *_metrics(report, arm), *_controls(report, arm)])
        or "Its quality was not compared with softmax's.",
        "quality_tables": [table for table in (tables.quality(beside), tables.metrics(beside)) if table.rows],
        "speed": _speeds(report, arm),
        "speed_table": tables.speed(beside),
        "commands": [command for command in (reproduce, report.command) if command],
        "details": [(key, value) for key, value in details(report) if key != "command"],
    }


def _stages(report: Report, arm: Arm) -> Table:
    """Return a table of the stages: what trained on how much data."""

    def loss(stage: Stage) -> str:
        if stage.first_loss is None or stage.last_loss is None:
            return "-"
        return f"{number(stage.first_loss)} to {number(stage.last_loss)}"

    columns = [
        Column("stage", lambda stage: stage.stage),
        Column("what trains", lambda stage: stage.trains),
        Column("text", lambda stage: plain(stage.text)),
        Column(report.data.unit, lambda stage: "-" if stage.size is None else count(stage.size)),
        Column("steps", lambda stage: "-" if stage.steps is None else count(stage.steps)),
        Column("learning rate", lambda stage: "-" if stage.learning_rate is None else f"{stage.learning_rate:g}"),
        Column("loss", loss),
    ]
    return Table.of("", columns, arm.training)


def _training(report: Report, arm: Arm) -> str:
    new = f"New parameters: {count(arm.new_parameters)}."
    if arm.training:
        return f"{new} The table is of seed {report.seeds[0]}." if len(report.seeds) > 1 else new
    if arm.alignment:
        return (
            f"Each swapped layer was aligned with the softmax output of its layer on {count(arm.alignment.tokens)} "
            f"tokens of {escape(plain(report.data.training))}; the loss went from {number(arm.alignment.first_loss)} "
            f"to {number(arm.alignment.last_loss)}. {new}"
        )
    if arm.conversion:
        return f"How it was trained was not recorded. {new}"
    return "None: the weights are those of the model that was converted."


def _perplexities(report: Report, arm: Arm) -> list[str]:
    """Return lines on perplexity with its interval, against softmax and the controls."""
    return [line for entry in arm.perplexity for line in _perplexity(report, arm, entry)]


def _perplexity(report: Report, arm: Arm, entry: Perplexity) -> list[str]:
    tuned = facts.tuned_softmax(report, arm)
    controls = {other.label: other for other in _beside(report, arm).arms if other is not tuned}
    ratio, lines = facts.ratio(report, arm, entry.context), []
    softmax = f"softmax trained too, on {count(tuned.training_tokens)} tokens" if tuned else "softmax"
    if ratio:
        bounds = "95 % interval in parentheses, " if ratio.low is not None else ""
        lines.append(
            f"- At context {count(entry.context)}: perplexity {number(entry.perplexity or 0)}, "
            f"{interval(ratio)} that of {softmax}, {bounds}on {count(entry.tokens)} tokens."
        )
    others = ([entry.ratio] if tuned and entry.ratio else []) + entry.against
    for compared in others:
        control = controls.get(compared.arm)
        if control:
            trained = (
                f"trained on {count(control.training_tokens)} tokens" if control.training_tokens else "not trained"
            )
            verdict = compared.verdict or "too few blocks to say"
            equal = [f"of equal {own.equal}" for own in arm.controls if own.arm == compared.arm]
            named = ", ".join([escape(plain(compared.arm)), *equal, trained])
            lines.append(f"- At context {count(entry.context)}, against {named}: {interval(compared)}, {verdict}.")
    return lines


def _controls(report: Report, arm: Arm) -> list[str]:
    """Return lines on the controls of equal state and time: what the better one says, and what is amiss with them."""
    lines = [
        f"- Control of equal {control.equal}{f', {escape(plain(control.arm))}' if control.arm else ''}: "
        f"{escape(plain(control.note))}."
        for control in arm.controls
        if control.note
    ]
    best = facts.better_control(report, arm)
    if best:
        lines.append(
            f"- Against the better of its controls of equal state and of equal time, {escape(plain(best[1].label))}: "
            f"{interval(best[2])}, {best[2].verdict or 'too few blocks to say'}."
        )
    return lines


def _metrics(report: Report, arm: Arm) -> list[str]:
    """Return lines on every metric, beside that of softmax."""
    lines = []
    for entry in arm.metrics:
        compared: Comparison | None = facts.difference(report, arm, entry)
        if entry.value is None or compared is None:
            continue
        bounds = f" ({number(entry.low)} to {number(entry.high)})" if entry.low is not None and entry.high else ""
        share = f", {interval(entry.ratio)} that of softmax trained the same way" if entry.ratio else ""
        lines.append(
            f"- {escape(plain(f'{entry.task}: {entry.metric}'))} {number(entry.value)}{bounds} on {count(entry.items)} "
            f"items, {escape(difference(compared))} beside softmax{share}."
        )
    return lines


def _beside(report: Report, arm: Arm) -> Report:
    """Return the report with this arm, softmax, and the controls in the same layers only."""
    linear = arm.attention.removesuffix("+window")
    own = {control.arm for control in arm.controls}
    of_others = {control.arm for other in report.arms for control in other.controls} - own
    shown = [
        other
        for other in report.arms
        if other is arm
        or other.attention == "softmax"
        or other.label in own
        or (
            (other.control or other.attention == linear)
            and other.label not in of_others
            and facts.same_layers(other, arm)
        )
    ]
    return replace(report, arms=shown)


def _speeds(report: Report, arm: Arm) -> list[str]:
    """Return lines that say from which length on the arm is faster."""
    named = {"prefill_speedup": "Prefill", "forward_speedup": "Forward pass", "decode_speedup": "Decoding"}
    if report.kind == "tradeoff":
        named.pop("forward_speedup")
    else:
        named = {key: what for key, what in named.items() if facts.speedups(arm, key)}
    return [_faster(report, arm, key, what) for key, what in named.items()] or ["Not measured."]


def _faster(report: Report, arm: Arm, key: str, what: str) -> str:
    speedups = facts.speedups(arm, key)
    if not speedups:
        return f"{what}: not measured."
    start, (longest, spread) = facts.faster_from(report, arm, key), speedups[-1]
    said = f"{what}: {times(spread.median)} the speed of softmax at {count(longest)} tokens, the longest measured"
    if facts.is_noise(report, arm, key, longest):
        said += ", which is noise: no attention at all is slower"
    if facts.few_rounds([spread]):
        return f"{said}; too few rounds to say from which length on it is faster."
    if start is None:
        return f"{said}; no length was found from which on it is faster in every run."
    return f"{said}; faster in every run from {count(start)} tokens on."


def results(report: Report, arm: Arm) -> list[dict[str, Any]]:
    """Return type, name and value of each metric for the model-index of the card, with the data where not the text."""
    found = []
    for metric in arm.metrics:
        if metric.value is not None:
            named = {"metric_type": metric.metric, "metric_name": metric.metric, "metric_value": metric.value}
            found.append({**named, "dataset_name": metric.task})
            if metric.ratio:
                share = {"metric_name": f"{metric.metric} / softmax's", "metric_value": metric.ratio.value}
                found.append({**named, **share, "dataset_name": metric.task})
    for entry in arm.perplexity:
        ratio = facts.ratio(report, arm, entry.context)
        name = "that of softmax trained too" if facts.tuned_softmax(report, arm) else "softmax's"
        values = {"perplexity": entry.perplexity, f"perplexity / {name}": ratio.value if ratio else None}
        found += [
            {"metric_type": "perplexity", "metric_name": f"{name}, context {entry.context}", "metric_value": value}
            for name, value in values.items()
            if value is not None
        ]
    return found


def reproduce(arm: Arm) -> str | None:
    """Return the command that trains the arm again by recipe.yaml; None for an arm that no recipe made."""
    if not arm.training:
        return None
    text = _text(arm)
    given = "".join(f" --{key} {shlex.quote(str(value))}" for key, value in text.items())
    return f"accelerate launch -m hf_attnswap.training --recipe recipe.yaml{given} --output_dir converted"


def recipe(report: Report, arm: Arm, base_model: str | None) -> dict[str, Any] | None:
    """Return the recipe that trains the arm again; None for an arm that no recipe made.

    The recipe leaves the text out where all stages had the same one: `reproduce` names that text.
    """
    if not arm.training:
        return None
    first = arm.training[0].arguments
    shared = {key: first[key] for key in _SHARED if key in first}
    text = _text(arm)
    stages = [
        {"stage": stage.stage}
        | {key: v for key, v in stage.arguments.items() if key not in text and (number or key not in _SHARED)}
        for number, stage in enumerate(arm.training)
    ]
    name = report.model.name
    name = name if base_model is None or name.endswith(".gguf") else base_model
    return {"model_name_or_path": name, **shared, "stages": stages}


def _text(arm: Arm) -> dict[str, Any]:
    """Return the arguments that name the text, where all stages had the same one; else an empty dictionary."""
    texts = [{key: stage.arguments[key] for key in _TEXT if key in stage.arguments} for stage in arm.training]
    return texts[0] if all(text == texts[0] for text in texts) else {}


_SHARED = ("attention", "layers", "options")  # what the first stage alone is told
_TEXT = ("train_file", "dataset_name", "dataset_config_name", "text_column")
