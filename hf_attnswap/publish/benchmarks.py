"""Say what was measured of benchmarks that are registered on the Hub, as the files that its leaderboards read.

The format is that of https://huggingface.co/docs/hub/eval-results: a list of dataset, task and value, here with the
date and how the value was measured. Only a task of lm-eval that ran on every item of its benchmark is one.
"""

from dataclasses import dataclass

import yaml

from ..report.types import Arm, Report

FOLDER = ".eval_results"


@dataclass(frozen=True)
class Benchmark:
    """Name a benchmark by the dataset on the Hub and the task in its eval.yaml.

    Attributes:
        metrics: of lm-eval, as reports name them; the first that is there counts.
        items: how many the whole benchmark has.
    """

    dataset: str
    task: str
    metrics: tuple[str, ...]
    items: int


# By the name of lm-eval. Values are accuracies, which these leaderboards show in percent.
BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "gsm8k", ("exact_match,strict-match", "exact_match"), 1319),
    "gpqa_diamond_zeroshot": Benchmark("Idavidrein/gpqa", "diamond", ("acc",), 198),
}


def files(report: Report, arm: Arm) -> dict[str, bytes]:
    """Return the content of `.eval_results/TASK.yaml` by path, one for each benchmark that was measured of `arm`."""
    found = {}
    for name, benchmark in BENCHMARKS.items():
        own = {entry.metric: entry for entry in arm.metrics if entry.task == name and entry.items == benchmark.items}
        entry = next((own[metric] for metric in benchmark.metrics if metric in own), None)
        if entry is None or entry.value is None:
            continue
        result = {
            "dataset": {"id": benchmark.dataset, "task_id": benchmark.task},
            "value": round(100 * entry.value, 3),
            "date": report.date,
            "notes": f"lm-eval {name}, {entry.metric}",
        }
        found[f"{FOLDER}/{name}.yaml"] = yaml.safe_dump([result], sort_keys=False).encode()
    return found
