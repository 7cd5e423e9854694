"""Write what planning found: plan.yaml, and the Pareto table and plot."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..sources.files import write_whole
from ..sources.plans import write_plan
from .outcome import Outcome


def paths(output_dir: Path) -> list[Path]:
    """Return the files that `write_all` writes."""
    return [output_dir / name for name in ("plan.yaml", "pareto.json", "pareto.png", "pareto.svg")]


def write_all(outcome: Outcome, model: PreTrainedModel, output_dir: Path) -> None:
    """Write plan.yaml, pareto.json, pareto.png and pareto.svg, each whole."""
    from .drawing import pareto  # matplotlib takes a second to import

    picture = pareto(outcome)
    content = json.dumps(_rounded(outcome.as_dict()), indent=1) + "\n"
    plan, table, png, svg = paths(output_dir)
    write_whole(table, content.encode())
    write_whole(png, picture.png)
    write_whole(svg, picture.svg)
    write_plan(plan, outcome.config, model, _comment(outcome))  # last: where it is, all is


def _comment(outcome: Outcome) -> str:
    """Return the lines at the top of the plan: what was asked for, and what the plan has."""
    met = ", ".join(f"{bound.budget}{'' if bound.met else ' (missed)'}" for bound in outcome.bounds)
    damage = outcome.plan.damage["value"]
    has = f"{damage:.4g} times softmax's perplexity" if outcome.ratios else f"answers {damage:.2g} off softmax's"
    kept = len(outcome.plan.kept)
    return f"Made by attnswap plan for {met}.\nKeeps {kept} of {outcome.total} key/value groups; untrained, {has}."


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
