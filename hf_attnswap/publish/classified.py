"""Say how a classifier is made again, from the report of a comparison of classifiers."""

from typing import Any

from ..report.types import Arm, Report


def reproduce(arm: Arm) -> str | None:
    """Return None: the command that measured trains too, and no other command does.

    recipe.yaml holds arguments of a script that takes no recipe.
    """
    return None


def recipe(report: Report, arm: Arm, base_model: str | None) -> dict[str, Any]:
    """Return the arguments of the script that trained the classifier `arm`, in a clone of the repository.

    Args:
        base_model: Hub id of the model that was converted; None takes the name in the report.
    """
    data, options = report.data, arm.options
    layers = arm.swapped[0].layers
    whole = len(layers) == report.model.attention_layers
    return {
        "script": "benchmarks/classify.py",
        "model_name_or_path": base_model or report.model.name,
        "attention": arm.attention,
        **({"options": options} if options else {}),
        **({} if whole else {"layers": layers}),
        "train_file": data.training,
        "validation_file": data.evaluation,
        **{key: value for key, value in report.settings.items() if value is not None and key != "processes"},
        "seed": report.seeds[0],
    }
