"""What a card says of a classifier, from the JSON of examples/classify_all.py."""

from typing import Any

from ..report import classification, facts
from ..report.facts import Arm, Report
from ..report.markdown import markdown_table
from ..report.text import count, number, plain, times

details = classification.details


def data_name(report: Report) -> str:
    """The texts that the quality was measured on."""
    return plain(report["title"])


def training(report: Report, arm: Arm) -> str:
    """What trained on how many texts."""
    rows = [["stage", "what trains", "text", "texts", "steps", "learning rate", "loss"]]
    for stage in arm["training"]:
        loss = f"{number(stage['first_loss'])} to {number(stage['last_loss'])}"
        amounts = [count(stage["texts"]), count(stage["steps"]), f"{stage['learning_rate']:g}"]
        rows.append([stage["stage"], stage["trains"], plain(stage["text"]), *amounts, loss])
    told = f"New parameters: {count(arm['new_parameters'])}. The table is of seed {report['seeds'][0]}."
    return f"{markdown_table(rows)}\n\n{told}"


def quality(report: Report, arm: Arm) -> list[str]:
    """Accuracy with its interval, then beside softmax trained the same way and the controls."""
    data = report["data"]
    said = (
        f"Accuracy {classification.percent(arm['accuracy'])} on {count(data['evaluation_texts'])} texts of "
        f"{plain(data['evaluation'])}, {classification.percent(arm['ratio'])} of that of softmax trained the same way, "
        "95 % intervals in parentheses."
    )
    return [said, markdown_table(classification.rows(_beside(report, arm)))]


def speed(report: Report, arm: Arm) -> list[str]:
    """From which length on it is faster, then every length beside softmax and the controls."""
    speedups = facts.speedups(arm, "forward_speedup")
    if not speedups:
        return ["Not measured."]
    start, (longest, spread) = facts.faster_from(arm, "forward_speedup"), speedups[-1]
    said = f"{times(spread['median'])} the speed of softmax at {count(longest)} tokens, the longest measured; "
    said += (
        "no length was found from which on it is faster in every run."
        if start is None
        else f"faster in every run from {count(start)} tokens on."
    )
    return [said, markdown_table(classification.speed_rows(_beside(report, arm)))]


def _beside(report: Report, arm: Arm) -> Report:
    shown = [other for other in report["arms"] if other is arm or other["control"]]
    return report | {"arms": shown}


def results(report: Report, arm: Arm) -> list[dict[str, Any]]:
    """For the model-index: type, name and value of each metric."""
    values = {"accuracy": arm["accuracy"]["value"], "accuracy / softmax's": arm["ratio"]["value"]}
    return [{"metric_type": "accuracy", "metric_name": name, "metric_value": value} for name, value in values.items()]


def reproduce(arm: Arm) -> str | None:
    """recipe.yaml holds arguments of a script that takes no recipe; the command that measured trains too."""
    return None


def recipe(report: Report, arm: Arm, base_model: str | None) -> dict[str, Any]:
    """Return the arguments of the script that trained it, in a clone of the repository."""
    data, options = report["data"], arm["options"]
    layers = arm["swapped"][0]["layers"]
    whole = len(layers) == report["model"]["attention_layers"]
    return {
        "script": "benchmarks/classify.py",
        "model_name_or_path": base_model or report["model"]["name"],
        "attention": arm["attention"],
        **({"options": options} if options else {}),
        **({} if whole else {"layers": layers}),
        "train_file": data["training"],
        "validation_file": data["evaluation"],
        **{key: value for key, value in report["arguments"].items() if value is not None},
        "seed": report["seeds"][0],
    }
