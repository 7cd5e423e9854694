"""Fine-tune an encoder on labelled texts with one attention after the other, all alike, and compare their accuracies.

Every arm runs `classify.py` once per seed, with the arguments that are not listed here. Two runs with one seed see the
same texts in the same order and start from the same head. What is done stays in `output_dir/runs`, so the same command
goes on where it was interrupted. With `--keep_models` the models stay there; `attnswap card` writes the card of one of
them from results.json.

    accelerate launch benchmarks/classify_all.py --model_name_or_path MODEL --arm none --arm relu_norm --arm hedgehog \\
        --train_file train.tsv --validation_file dev.tsv --text_column sentence --max_train_samples 4096 \\
        --title "SST-2" --output_dir comparison
"""

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import classify
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnswap import UsageError, attentions, swap
from hf_attnswap.benchmark.reading import reading
from hf_attnswap.config import NAME
from hf_attnswap.errors import one_line_errors
from hf_attnswap.integration.swapping import swapped_modules
from hf_attnswap.report import classification
from hf_attnswap.sources.files import write_whole
from hf_attnswap.sources.models import load_classifier
from hf_attnswap.tradeoff import Arm, describe_model, machine, parse_options, versions
from hf_attnswap.training.options import positive

DEFAULT_ARMS = "softmax none relu_norm relu_power sigmoid identity elu hedgehog t2r".split()
RESAMPLES = 4000
LENGTHS, ROUNDS = (64, 128, 256, 512), 7  # of speed
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
    rows = described(arms, models, runs, failures, shared, args.output_dir / "runs")
    name = Path(shared.model_name_or_path)
    report = {
        "schema": classification.NAME,
        "version": classification.VERSION,
        "title": args.title,
        "model": describe_model(models["softmax"], "/".join(name.parts[-2:]) if name.is_absolute() else str(name)),
        "seeds": [found["arguments"]["seed"] for found in runs["softmax"]],
        "data": {
            "training": Path(shared.train_file).name,
            "training_texts": rows[0]["training"][-1]["texts"] // shared.num_train_epochs,
            "evaluation": Path(shared.validation_file).name,
            "evaluation_texts": len(runs["softmax"][0]["correct"]),
        },
        "arguments": {
            name: value
            for name, value in classify.identity(shared).items()
            if name not in NOT_SHARED and not name.endswith("_file")
        },
        "machine": machine(torch.device(PartialState().device)),
        "processes": PartialState().num_processes,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(
            [
                "accelerate launch benchmarks/classify_all.py",
                shlex.join(map(without_folders, sys.argv[1:] if argv is None else argv)),
            ]
        ),
        "arms": rows,
    }
    if PartialState().is_main_process:
        classification.write(report, args.output_dir / "results.json")
        write_whole(args.output_dir / "results.md", classification.render(report).encode())
    PartialState().print(classification.render(report))
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
    folder: Path,
) -> list[dict[str, Any]]:
    """The arms, as `report.classification` takes them."""
    config = models["softmax"].config
    speed = reading(models, [n for n in LENGTHS if n <= config.max_position_embeddings], ROUNDS, config.vocab_size)
    accuracies = compare({label: [found["correct"] for found in runs[label]] for label in models})
    rows = []
    for label, arm in arms.items():
        cls = attentions.get(arm.attention)
        row = {
            "label": label, "attention": arm.attention, "options": arm.options,
            "control": cls.control or label == "softmax", "formula": cls.formula, "cost": cls.cost,
            "cost_class": cls.cost_class, "source": cls.source,
        }  # fmt: skip
        if label in failures:
            row |= {"status": "failed", "reason": failures[label], "swapped": [], "new_parameters": 0, "training": []}
            row |= {"accuracy": None, "accuracy_by_seed": [], "difference": None, "ratio": None, "speed": []}
        else:
            own = [p.numel() for variant in swapped_modules(models[label]).values() for p in variant.parameters()]
            row |= {
                "status": "measured",
                "reason": None,
                "swapped": (getattr(models[label].config, NAME, None) or {}).get("swapped") or [],
                "new_parameters": sum(own),
                "training": stages(folder / f"{label}_{shared.seed}", shared, bool(runs[label][0]["alignment"])),
                "speed": speed[label],
                **accuracies[label],
            }
        rows.append(row)
    return rows


def build(arm: Arm, shared: argparse.Namespace) -> PreTrainedModel:
    """A model of the arm as it is before training, to see what it holds and how fast it is."""
    model, _ = load_classifier(shared.model_name_or_path, ["0", "1"], dtype=shared.dtype, device=PartialState().device)
    return model if arm.attention == "softmax" else swap(model, arm.attention, layers=arm.layers, **arm.options).eval()


def stages(folder: Path, shared: argparse.Namespace, aligned: bool) -> list[dict[str, Any]]:
    """What a run did, from its logs."""
    found = []
    for stage, place, trains in (
        ("align", "alignment", "the parameters of the variant"),
        ("finetune", ".", "all weights"),
    )[not aligned :]:
        log = [json.loads(line) for line in (folder / place / "training_log.jsonl").read_text().splitlines()]
        found.append(
            {
                "stage": stage,
                "trains": trains,
                "text": Path(shared.train_file).name,
                "texts": log[-1]["texts"],
                "steps": len(log),
                "learning_rate": shared.align_learning_rate if stage == "align" else shared.learning_rate,
                "first_loss": log[0]["loss"],
                "last_loss": log[-1]["loss"],
            }
        )
    return found


def without_folders(argument: str) -> str:
    """Where a file lies on this machine says nothing to others."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def compare(correct: dict[str, list[list[int]]]) -> dict[str, dict[str, Any]]:
    """Every arm beside softmax. Intervals are of a bootstrap over the validation texts, the same for both (paired).

    Args:
        correct: for each arm and seed, 1 or 0 for every text.
    """
    marks = {label: torch.tensor(by_seed).double() for label, by_seed in correct.items()}
    count = marks["softmax"].shape[1]
    picks = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    found = {}
    for label, own in marks.items():
        ours, control = own.mean(0), marks["softmax"][: len(own)].mean(0)
        a, b = ours[picks].mean(1), control[picks].mean(1)
        found[label] = {
            "accuracy_by_seed": own.mean(1).tolist(),
            "accuracy": estimate(ours.mean(), a),
            "difference": estimate(ours.mean() - control.mean(), a - b),
            "ratio": estimate(ours.mean() / control.mean(), a / b),
        }
    return found


def estimate(value: Tensor, resampled: Tensor) -> dict[str, float]:
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return {"value": value.item(), "low": low, "high": high}


if __name__ == "__main__":
    with one_line_errors("classify_all"):
        main()
