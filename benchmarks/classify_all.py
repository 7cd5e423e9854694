"""Fine-tune an encoder on labelled texts with one attention after the other, all alike, and compare their accuracies.

Every arm runs `classify.py` once per seed, with the arguments that are not listed here. Two runs with one seed see the
same texts in the same order and start from the same head. What is done stays in `output_dir/runs`, so the same command
goes on where it was interrupted. With `--keep_models` the models stay there; `attnswap card` writes the card of one of
them from report.json.

    accelerate launch benchmarks/classify_all.py --model_name_or_path MODEL --arm none --arm relu_norm --arm hedgehog \\
        --train_file train.tsv --validation_file dev.tsv --text_column sentence --max_train_samples 4096 \\
        --title "SST-2" --output_dir comparison
"""

import argparse
import dataclasses
import json
import operator
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import classify
import torch
from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedModel

from hf_attnswap import UsageError, attentions, swap
from hf_attnswap import report as reports
from hf_attnswap.benchmark.reading import reading
from hf_attnswap.config import NAME
from hf_attnswap.errors import one_line_errors
from hf_attnswap.integration.swapping import swapped_modules
from hf_attnswap.report import types
from hf_attnswap.report.types import Data, Report
from hf_attnswap.sources.models import load_classifier
from hf_attnswap.statistics import bootstrap, paired_bootstrap
from hf_attnswap.tradeoff import Arm, describe_model, machine, now, parse_options, versions
from hf_attnswap.tradeoff.rows import compared
from hf_attnswap.training.options import positive

DEFAULT_ARMS = "softmax none relu_norm relu_power sigmoid identity elu hedgehog t2r".split()
LENGTHS, ROUNDS = (64, 128, 256, 512), 7  # of speed
# What differs between arms, or says nothing to others.
NOT_SHARED = "attention layers option seed model_name_or_path".split()


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the script; return what it writes to report.json."""
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
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="for report.json, report.md, report.html and runs/"
    )
    args, rest = parser.parse_known_args(argv)
    arms = {arm.label: arm for arm in map(Arm.parse, dict.fromkeys(["softmax", *(args.arm or DEFAULT_ARMS)]))}
    shared = classify.parse([*rest, "--output_dir", str(args.output_dir)])
    if any(arm.conversion for arm in arms.values()):
        raise UsageError("an arm is a folder; here every arm is trained, so name variants")
    if shared.attention or shared.layers or shared.option or shared.resume_from_checkpoint:
        raise UsageError("--attention, --layers, --option and --resume_from_checkpoint are set for each arm: use --arm")
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in arms}
    failures: dict[str, str] = {}
    for seed in range(shared.seed, shared.seed + args.num_seeds):
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
    models = {label: build(arm, shared) for label, arm in arms.items() if label not in failures}
    rows = described(arms, models, runs, failures, shared, args)
    name = Path(shared.model_name_or_path)
    training_texts = (rows[0].training[-1].size or 0) // shared.num_train_epochs
    settings = {
        name: value
        for name, value in classify.identity(shared).items()
        if name not in NOT_SHARED and not name.endswith("_file")
    }
    report = Report(
        kind="classification",
        title=args.title,
        model=describe_model(models["softmax"], "/".join(name.parts[-2:]) if name.is_absolute() else str(name)),
        machine=machine(torch.device(PartialState().device)),
        versions=versions(),
        date=now(),
        command=" ".join(
            [
                "accelerate launch benchmarks/classify_all.py",
                shlex.join(map(without_folders, sys.argv[1:] if argv is None else argv)),
            ]
        ),
        seeds=[found["arguments"]["seed"] for found in runs["softmax"]],
        data=Data(
            training=Path(shared.train_file).name,
            training_size=training_texts,
            evaluation=Path(shared.validation_file).name,
            evaluation_size=len(runs["softmax"][0]["correct"]),
            unit="texts",
        ),
        arms=rows,
        settings=settings | {"processes": PartialState().num_processes},
    )
    if PartialState().is_main_process:
        reports.write_all(report, args.output_dir)
        Console().print(reports.show(report, args.output_dir / "report.html"))
    return report


def run(arm: Arm, seed: int, rest: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """What `classify.py` finds for an arm, from an earlier run where there is one."""
    folder = args.output_dir / "runs" / f"{arm.label}_{seed}"
    command = [*rest, "--seed", str(seed), "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    if arm.attention != "softmax":  # the control is the model itself, not our own path
        command += ["--attention", arm.attention]
        command += [f"--option={name}={json.dumps(value)}" for name, value in arm.options.items()]
        if arm.layers is not None:
            command += ["--layers", arm.layers if isinstance(arm.layers, str) else ",".join(map(str, arm.layers))]
    path = folder / "evaluation.json"
    if path.is_file():
        found = json.loads(path.read_text())
        asked = classify.identity(classify.parse(command))
        if settled(found["arguments"]) != settled(asked):
            raise UsageError(f"{str(folder)!r} holds a run with other arguments: name another output_dir, or remove it")
    else:
        found = classify.main(command)
    if not args.keep_models and PartialState().is_main_process:
        for part in ("model", "checkpoints", "alignment/checkpoints"):
            shutil.rmtree(folder / part, ignore_errors=True)
    return found


def settled(arguments: dict[str, Any]) -> dict[str, Any]:
    """All arguments and options of the variant: what a run left at its default, or did not know yet, is among them."""
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(classify.Classify)
        if not field.metadata.get("elsewhere")
    }
    options = attentions.get(arguments["attention"] or "softmax").check_options(
        parse_options(arguments["option"] or [])
    )
    return {**defaults, **arguments, "option": options}


def described(
    arms: dict[str, Arm],
    models: dict[str, PreTrainedModel],
    runs: dict[str, list[dict[str, Any]]],
    failures: dict[str, str],
    shared: classify.Classify,
    args: argparse.Namespace,
) -> list[types.Arm]:
    """Return the arms as the report has them."""
    config = models["softmax"].config
    speed = reading(models, [n for n in LENGTHS if n <= config.max_position_embeddings], ROUNDS, config.vocab_size)
    metrics = compare({label: [found["correct"] for found in runs[label]] for label in models}, args.title)
    rows = []
    for label, arm in arms.items():
        cls, told = attentions.get(arm.attention), {}
        if label not in failures:
            own = [p.numel() for variant in swapped_modules(models[label]).values() for p in variant.parameters()]
            folder = args.output_dir / "runs" / f"{label}_{shared.seed}"
            saved = (getattr(models[label].config, NAME, None) or {}).get("swapped") or []
            told = {
                "swapped": [types.Group(**group) for group in saved],
                "new_parameters": sum(own),
                "training": stages(folder, shared, bool(runs[label][0]["alignment"])),
                "speed": speed[label],
                "metrics": [metrics[label]],
            }
        made = types.Arm(
            label=label, attention=arm.attention, options=arm.options, control=cls.control or label == "softmax",
            formula=cls.formula, cost=cls.cost, cost_class=cls.cost_class, source=cls.source,
            status="failed" if label in failures else "measured", reason=failures.get(label),
            **{"new_parameters": 0} | told,
        )  # fmt: skip
        rows.append(made)
    return rows


def build(arm: Arm, shared: argparse.Namespace) -> PreTrainedModel:
    """A model of the arm as it is before training, to see what it holds and how fast it is."""
    model, _ = load_classifier(shared.model_name_or_path, ["0", "1"], dtype=shared.dtype, device=PartialState().device)
    return model if arm.attention == "softmax" else swap(model, arm.attention, layers=arm.layers, **arm.options).eval()


def stages(folder: Path, shared: argparse.Namespace, aligned: bool) -> list[types.Stage]:
    """Return what a run did, from its logs."""
    found = []
    for stage, place, trains in (
        ("align", "alignment", "the parameters of the variant"),
        ("finetune", ".", "all weights"),
    )[not aligned :]:
        log = [json.loads(line) for line in (folder / place / "training_log.jsonl").read_text().splitlines()]
        found.append(
            types.Stage(
                stage=stage,
                trains=trains,
                text=Path(shared.train_file).name,
                size=log[-1]["texts"],
                steps=len(log),
                learning_rate=shared.align_learning_rate if stage == "align" else shared.learning_rate,
                first_loss=log[0]["loss"],
                last_loss=log[-1]["loss"],
            )
        )
    return found


def without_folders(argument: str) -> str:
    """Where a file lies on this machine says nothing to others."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def compare(correct: dict[str, list[list[int]]], task: str = "texts") -> dict[str, types.Metric]:
    """Return the accuracy of every arm beside softmax's on the same texts, the mean of the seeds.

    Args:
        correct: for each arm and seed, 1 or 0 for every text.
    """
    found = {}
    for label, by_seed in correct.items():
        own, softmax = means(by_seed), means(correct["softmax"][: len(by_seed)])
        alone = bootstrap(own)
        metric = found[label] = types.Metric(
            task, "accuracy", True, alone.value, None, alone.items, alone.low, alone.high,
            by_seed=[sum(marks) / len(marks) for marks in by_seed],
        )  # fmt: skip
        if label == "softmax":
            continue
        less = paired_bootstrap(own, softmax)
        metric.difference = compared("softmax", less, lower_is_better=False)
        if sum(softmax):
            share = paired_bootstrap(own, softmax, compare=operator.truediv)
            metric.ratio = replace(compared("softmax", share, lower_is_better=False), verdict=less.verdict())
    return found


def means(by_seed: list[list[int]]) -> list[float]:
    """Return the mean over the seeds for every text."""
    return [sum(marks) / len(marks) for marks in zip(*by_seed, strict=True)]


if __name__ == "__main__":
    with one_line_errors("classify_all"):
        main()
