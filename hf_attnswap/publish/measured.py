"""What a card says of a language model, from the JSON of `attnswap tradeoff`."""

import shlex
from typing import Any

from ..report import facts, table
from ..report.facts import Arm, Report
from ..report.markdown import escape, markdown_table
from ..report.text import count, interval, number, plain, times

details = table.details


def data_name(report: Report) -> str:
    """The text that the quality was measured on."""
    return plain(report["data"]["text"])


def training(report: Report, arm: Arm) -> str:
    """What trained on how much text."""
    if arm["training"]:
        rows = [["stage", "what trains", "text", "tokens", "steps", "learning rate", "loss"]]
        for stage in arm["training"]:
            loss = f"{number(stage['first_loss'])} to {number(stage['last_loss'])}"
            amounts = [count(stage["tokens"]), count(stage["steps"]), f"{stage['learning_rate']:g}"]
            rows.append([stage["stage"], stage["trains"], plain(stage["text"]), *amounts, loss])
        return f"{markdown_table(rows)}\n\n{_new_parameters(arm)}"
    alignment = arm["alignment"]
    if alignment:
        return (
            f"Each swapped layer was aligned with the softmax output of its layer on {count(alignment['tokens'])} "
            f"tokens of {escape(plain(report['data']['text']))}; the loss went from {number(alignment['first_loss'])} "
            f"to {number(alignment['last_loss'])}. {_new_parameters(arm)}"
        )
    if arm["conversion"]:
        return f"How it was trained was not recorded. {_new_parameters(arm)}"
    return "None: the weights are those of the model that was converted."


def _new_parameters(arm: Arm) -> str:
    return f"New parameters: {count(arm['new_parameters'])}."


def quality(report: Report, arm: Arm) -> list[str]:
    """Perplexity with its interval, against softmax and the controls, then the table of them."""
    lines, beside, tuned = [], _beside(report, arm), facts.tuned_softmax(report, arm)
    controls = {other["label"]: other for other in beside["arms"] if other is not tuned}
    softmax = f"softmax trained too, on {count(tuned['training_tokens'])} tokens" if tuned else "softmax"
    for entry in arm["perplexity"]:
        ratio, others = facts.ratio(report, arm, entry["context"]), entry["against"]
        if ratio:
            lines.append(
                f"- At context {count(entry['context'])}: perplexity {number(entry['perplexity'])}, "
                f"{interval(ratio, 'value')} that of {softmax}, 95 % interval in parentheses, on "
                f"{count(entry['tokens'])} tokens."
            )
        if tuned and entry["ratio"]:
            others = [{"arm": "softmax", **entry["ratio"]}, *others]
        for found in others:
            if found["arm"] in controls:
                tokens = controls[found["arm"]]["training_tokens"]
                trained = f"trained on {count(tokens)} tokens" if tokens else "not trained"
                lines.append(
                    f"- At context {count(entry['context'])}, against {escape(plain(found['arm']))}, {trained}: "
                    f"{interval(found, 'value')}, {found['verdict']}."
                )
    said = "\n".join(lines) or "Its perplexity was not compared with softmax's."
    return [said, markdown_table(table.rows(beside))]


def speed(report: Report, arm: Arm) -> list[str]:
    """From which length on it is faster, then every length beside softmax and the controls."""
    said = [
        _crossover(arm, key, what) for key, what in (("prefill_speedup", "Prefill"), ("decode_speedup", "Decoding"))
    ]
    return [*said, markdown_table(table.speed_rows(_beside(report, arm)))]


def _beside(report: Report, arm: Arm) -> Report:
    """The report of this arm, softmax, and the controls in the same layers."""
    linear = arm["attention"].removesuffix("+window")
    shown = [
        other
        for other in report["arms"]
        if other is arm
        or other["attention"] == "softmax"
        or ((other["control"] or other["attention"] == linear) and facts.same_layers(other, arm))
    ]
    return report | {"arms": shown}


def _crossover(arm: Arm, key: str, what: str) -> str:
    speedups = facts.speedups(arm, key)
    if not speedups:
        return f"{what}: not measured."
    start, (longest, spread) = facts.faster_from(arm, key), speedups[-1]
    said = f"{what}: {times(spread['median'])} the speed of softmax at {count(longest)} tokens, the longest measured"
    if start is None:
        return f"{said}; no length was found from which on it is faster in every run."
    return f"{said}; faster in every run from {count(start)} tokens on."


def results(report: Report, arm: Arm) -> list[dict[str, Any]]:
    """For the model-index: type, name and value of each metric, and the data where they are others than the text."""
    found = [
        {"metric_type": task["metric"], "metric_name": task["metric"], "metric_value": task["value"]}
        | {"dataset_name": task["task"]}
        for task in arm["tasks"]
        if task["value"] is not None
    ]
    for entry in arm["perplexity"]:
        ratio = facts.ratio(report, arm, entry["context"])
        name = "that of softmax trained too" if facts.tuned_softmax(report, arm) else "softmax's"
        values = {"perplexity": entry["perplexity"], f"perplexity / {name}": (ratio or {}).get("value")}
        found += [
            {"metric_type": "perplexity", "metric_name": f"{name}, context {entry['context']}", "metric_value": value}
            for name, value in values.items()
            if value is not None
        ]
    return found


def reproduce(arm: Arm) -> str | None:
    """Return the command that trains it by recipe.yaml; None for what no recipe made."""
    if not arm["training"]:
        return None
    text = _text(arm)
    given = "".join(f" --{key} {shlex.quote(str(value))}" for key, value in text.items())
    return f"accelerate launch -m hf_attnswap.training --recipe recipe.yaml{given} --output_dir converted"


def recipe(report: Report, arm: Arm, base_model: str | None) -> dict[str, Any] | None:
    """Return the recipe that does it again, without the text where all stages had one; None for what no recipe made."""
    if not arm["training"]:
        return None
    shared = {key: arm["training"][0]["arguments"][key] for key in _SHARED if key in arm["training"][0]["arguments"]}
    text = _text(arm)
    stages = [
        {"stage": stage["stage"]}
        | {key: v for key, v in stage["arguments"].items() if key not in text and (number or key not in _SHARED)}
        for number, stage in enumerate(arm["training"])
    ]
    name = report["model"]["name"]
    name = name if base_model is None or name.endswith(".gguf") else base_model
    return {"model_name_or_path": name, **shared, "stages": stages}


def _text(arm: Arm) -> dict[str, Any]:
    """Return the arguments that name the text, where all stages had the same one."""
    texts = [{key: s["arguments"][key] for key in _TEXT if key in s["arguments"]} for s in arm["training"]]
    return texts[0] if all(text == texts[0] for text in texts) else {}


_SHARED = ("attention", "layers", "options")  # what the first stage alone is told
_TEXT = ("train_file", "dataset_name", "dataset_config_name", "text_column")
