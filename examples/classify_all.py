"""Fine-tune an encoder on labelled texts with one attention after the other, all alike, and compare their accuracies.

Every arm runs `classify.py` once per seed, with the arguments that are not listed here. Two runs with one seed see the
same texts in the same order and start from the same head. What is done stays in `output_dir/runs`, so the same command
goes on where it was interrupted.

    accelerate launch examples/classify_all.py --model_name_or_path MODEL --arm none --arm relu_norm --arm hedgehog \\
        --train_file train.tsv --validation_file dev.tsv --text_column sentence --max_train_samples 4096 \\
        --title "SST-2" --output_dir comparison
"""

import argparse
import datetime
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import classify
import torch
from accelerate import PartialState
from common import positive
from torch import Tensor

from hf_attnswap import UsageError, attentions
from hf_attnswap.errors import one_line_errors
from hf_attnswap.files import write_whole
from hf_attnswap.report.markdown import escape
from hf_attnswap.tradeoff import Arm, machine, versions

DEFAULT_ARMS = "softmax none relu_norm relu_power sigmoid identity elu hedgehog t2r".split()
RESAMPLES = 4000
# What differs between arms, or says nothing to others.
NOT_SHARED = "attention layers option seed model_name_or_path".split()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script; what it writes to results.json."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="All other arguments are those of classify.py, see there.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what it does not know goes to classify.py whole
    )
    parser.add_argument(
        "--arm", action="append", metavar="ARM", help='such as "relu_power:p=8"; softmax is always there (default: '
        f"{' '.join(DEFAULT_ARMS)})",
    )  # fmt: skip
    parser.add_argument("--num_seeds", type=positive, default=2, help="runs per arm (default: %(default)s)")
    parser.add_argument("--title", default="Accuracy after fine-tuning", help="of the table")
    parser.add_argument("--keep_models", action="store_true", help="keep the trained models and the checkpoints")
    parser.add_argument("--output_dir", type=Path, required=True, help="for results.json, results.md and runs/")
    args, rest = parser.parse_known_args(argv)
    arms = {arm.label: arm for arm in map(Arm.parse, dict.fromkeys(["softmax", *(args.arm or DEFAULT_ARMS)]))}
    shared = classify.build_parser().parse_args([*rest, "--output_dir", str(args.output_dir)])
    if shared.attention or shared.layers or shared.option or shared.resume_from_checkpoint:
        raise UsageError("--attention, --layers, --option and --resume_from_checkpoint are set for each arm: use --arm")
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in arms}
    failures: dict[str, str] = {}
    for seed in range(shared.seed, shared.seed + args.num_seeds):  # all arms of a seed first: part of it is a table too
        for label, arm in arms.items():
            if label in failures:
                continue
            try:
                found = run(arm, seed, rest, args)
            except (RuntimeError, FloatingPointError, NotImplementedError) as error:
                if label == "softmax" or os.environ.get("ATTNSWAP_DEBUG"):
                    raise
                failures[label] = (str(error) or repr(error)).splitlines()[0]
                continue
            runs[label].append(found)
        report = compare(args.title, arms, runs, failures, shared)
        if PartialState().is_main_process:
            write_whole(args.output_dir / "results.json", (json.dumps(report, indent=1) + "\n").encode())
            write_whole(args.output_dir / "results.md", markdown(report).encode())
    PartialState().print(markdown(report))
    return report


def run(arm: Arm, seed: int, rest: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """What `classify.py` finds for an arm, from an earlier run where there is one."""
    folder = args.output_dir / "runs" / f"{arm.label}_{seed}"
    command = [*rest, "--seed", str(seed), "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    if arm.attention != "softmax":  # the control is the model itself, not our own path
        command += ["--attention", arm.attention]
        command += [f"--option={name}={json.dumps(value)}" for name, value in arm.options.items()]
    path = folder / "evaluation.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if found["arguments"] != classify.identity(classify.build_parser().parse_args(command)):
            raise UsageError(f"{str(folder)!r} holds a run with other arguments: name another output_dir, or remove it")
    else:
        found = classify.main(command)
    if not args.keep_models and PartialState().is_main_process:
        for part in ("model", "checkpoints", "alignment/checkpoints"):
            shutil.rmtree(folder / part, ignore_errors=True)
    return found


def compare(
    title: str,
    arms: dict[str, Arm],
    runs: dict[str, list[dict[str, Any]]],
    failures: dict[str, str],
    shared: argparse.Namespace,
) -> dict[str, Any]:
    """Every arm beside softmax. Intervals are of a bootstrap over the validation texts, the same for both (paired)."""
    correct = {label: torch.tensor([found["correct"] for found in done]).double() for label, done in runs.items()}
    count = correct["softmax"].shape[1]
    picks = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    rows = []
    for label, arm in arms.items():
        done, cls = runs[label], attentions.get(arm.attention)
        row = {"label": label, "options": arm.options, "cost": cls.cost, "control": cls.control or label == "softmax"}
        if label in failures or not done:
            rows.append(row | {"failed": failures.get(label, "not run")})
            continue
        seeds = len(done)
        ours, control = correct[label].mean(0), correct["softmax"][:seeds].mean(0)
        a, b = ours[picks].mean(1), control[picks].mean(1)
        rows.append(
            row
            | {
                "attention": done[0]["attention"],
                "alignment": [found["alignment"] for found in done],
                "loss": [found["last_loss"] for found in done],
                "accuracy_by_seed": [found["accuracy"] for found in done],
                "accuracy": estimate(ours.mean(), a),
                "difference": estimate(ours.mean() - control.mean(), a - b),
                "ratio": estimate(ours.mean() / control.mean(), a / b),
            }
        )
    return {
        "title": title,
        "rows": rows,
        "validation_texts": count,
        "seeds": [found["arguments"]["seed"] for found in runs["softmax"]],
        "arguments": {
            name: Path(value).name if name.endswith("_file") else value
            for name, value in classify.identity(shared).items()
            if name not in NOT_SHARED
        },
        "machine": machine(torch.device(PartialState().device)),
        "processes": PartialState().num_processes,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def estimate(value: Tensor, resampled: Tensor) -> dict[str, float]:
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return {"value": value.item(), "low": low, "high": high}


def markdown(report: dict[str, Any]) -> str:
    """The table, and how it came about."""
    columns = (
        "attention", "cost", "aligned", "accuracy, % (95 %)", "of each seed", "points to softmax (95 %)",
        "share of softmax's, % (95 %)",
    )  # fmt: skip
    lines = [columns, ["---"] * len(columns)]
    for row in report["rows"]:
        name = f"{row['label']} (control)" if row["control"] else row["label"]
        if "failed" in row:
            lines.append([escape(name), escape(row["cost"]), "", escape(f"failed: {row['failed']}"), "", "", ""])
            continue
        steps = row["alignment"][0]
        lines.append(
            [
                escape(name),
                escape(row["cost"]),
                f"{steps['steps']} steps" if steps else "-",
                _interval(row["accuracy"], "{:.1f}"),
                ", ".join(f"{100 * x:.1f}" for x in row["accuracy_by_seed"]),
                "-" if row["label"] == "softmax" else _interval(row["difference"], "{:+.1f}"),
                "100" if row["label"] == "softmax" else _interval(row["ratio"], "{:.1f}"),
            ]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    told, device = report["arguments"], report["machine"]
    seeds = ", ".join(map(str, report["seeds"]))
    return f"""# {escape(report["title"])}

{table}

- Every arm trains all weights on {_amount(told["max_train_samples"])} texts of {told["train_file"]}, \
{told["num_train_epochs"]} time(s), at most {told["max_length"]} tokens each, batches of \
{told["per_device_train_batch_size"] * told["gradient_accumulation_steps"] * report["processes"]}, AdamW at \
{told["learning_rate"]:g} after {told["num_warmup_steps"]} steps of warm-up, no dropout in the attention; seeds {seeds}.
- Attention with parameters is aligned before, for {told["align_steps"]} steps on the same texts, \
the long ones more often, at {told["align_learning_rate"]:g}: softmax flows on, each swapped layer learns its output.
- Accuracy on {report["validation_texts"]:,} texts of {told["validation_file"]}, mean of the seeds. The intervals are \
of a bootstrap over these texts, paired with softmax's; how runs with other seeds differ is not in them.
- {device["processor"]}, {device["threads"]} thread(s), {device["device"]}, torch {report["versions"]["torch"]}, \
transformers {report["versions"]["transformers"]}, {report["date"][:10]}.
"""


def _interval(found: dict[str, float], form: str) -> str:
    value, low, high = (form.format(100 * found[name]) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _amount(count: int | None) -> str:
    return "all" if count is None else f"{count:,}"


if __name__ == "__main__":
    with one_line_errors("classify_all"):
        main()
