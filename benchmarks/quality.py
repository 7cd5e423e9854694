"""What conversions keep: the perplexity of runs of recipes, stage by stage, beside softmax trained the same way.

    python benchmarks/quality.py runs/softmax runs/window runs/hedgehog_window \\
        --validation_file test.txt --output_dir quality

A run is a folder that the run of a recipe left; its name is that of the row. All are measured on the same blocks of
text, so differences are paired. What a stage is compared with:

- distill: its teacher, whose distribution it learns; softmax has nothing to learn there. That is the original, or
  softmax as the stages before the swap have trained it.
- finetune: the run of softmax with the same finetune stage. Cross-entropy teaches the style of the text to every model,
  the original too; a comparison with the untrained one would call that a gain.

Both are also compared with the run of `window` whose distill and finetune stages are the same: does the rest add
anything? Where no run was trained alike, the table says so by a dash.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from figures import heading, named
from torch import Tensor

from hf_attnswap import UsageError
from hf_attnswap.errors import one_line_errors
from hf_attnswap.evaluation.perplexity import Perplexity, perplexity, ratio
from hf_attnswap.integration.swapping import describe
from hf_attnswap.sources.files import write_whole
from hf_attnswap.sources.models import load
from hf_attnswap.sources.texts import TextSource, token_blocks

ORIGINAL, CONTROL, BESIDE = "original", "softmax", "window"
# Of the arguments of a stage, those that make it no other training: what stands in the layers, and what is looked at.
ASIDE = frozenset(
    "attention options layers new_parameters_learning_rate validation_file validation_steps max_validation_tokens "
    "checkpointing_steps".split()
)
OUTPUT = """\
output_dir:
  quality.json         everything, the nll of each block too; what it holds of a run is not measured again
  quality.md           the tables
  RUN/recipe.yaml      the stages of each run, with all their arguments
"""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script; what it writes to quality.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=OUTPUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a folder that the run of a recipe left")
    parser.add_argument("--validation_file", required=True, help="text that no run trained on")
    parser.add_argument("--context_length", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--max_eval_tokens", type=int, default=16384, help="(default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="see below")
    args = parser.parse_args(argv)
    recipes = {run.name: read(run) for run in args.runs}
    original = next(iter(recipes.values()))[0]["model_name_or_path"]
    for name, stages in recipes.items():
        if stages[0]["model_name_or_path"] != original:
            raise UsageError(f"run {name!r} began with {stages[0]['model_name_or_path']!r}, others with {original!r}")
    told = {
        "text": named(args.validation_file),
        "context": args.context_length,
        "max_eval_tokens": args.max_eval_tokens,
    }
    path = args.output_dir / "quality.json"
    report = heading(argv, **told, original=named(original), models={})
    before = json.loads(path.read_text()) if path.exists() else {}
    if before and any(before.get(key) != value for key, value in told.items()):
        raise UsageError(f"{str(path)!r} was measured on other text: name another output_dir")
    known = {key: model for key, model in before.get("models", {}).items() if key.split("/")[0] not in recipes}
    report["models"] |= known

    def measure(key: str, model: str, about: dict[str, Any]) -> None:
        found = before.get("models", {}).get(key)
        if found is None or {name: found.get(name) for name in about} != about:
            found = about | measured(model, args)
        report["models"][key] = found
        write_whole(path, (json.dumps(report, indent=1) + "\n").encode())

    args.output_dir.mkdir(parents=True, exist_ok=True)
    measure(ORIGINAL, original, {})
    for run in args.runs:
        stages, so_far, seconds = recipes[run.name], 0, 0.0
        (args.output_dir / run.name).mkdir(parents=True, exist_ok=True)
        write_whole(
            args.output_dir / run.name / "recipe.yaml", yaml.safe_dump({"stages": stages}, sort_keys=False).encode()
        )
        for number, stage in enumerate(stages, start=1):
            folder = run / f"{number}_{stage['stage']}"
            log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
            curve = curve_of(folder, so_far)
            so_far += log[-1]["tokens"]
            seconds += sum(entry["seconds"] for entry in log)
            if stage["stage"] == "align":
                continue
            about = {"stages": stages[:number], "tokens": so_far, "seconds": round(seconds), "curve": curve}
            measure(f"{run.name}/{label(stages[:number])}", str(folder / "model"), about)
    compare(report["models"])
    write_whole(path, (json.dumps(report, indent=1) + "\n").encode())
    write_whole(args.output_dir / "quality.md", markdown(report).encode())
    print(markdown(report))
    return report


def read(run: Path) -> list[dict[str, Any]]:
    """The stages of a run. UsageError where it is none, or not finished."""
    try:
        stages = yaml.safe_load((run / "recipe.yaml").read_text())["stages"]
    except FileNotFoundError:
        raise UsageError(f"{str(run)!r} is not a folder that the run of a recipe left: it has no recipe.yaml") from None
    last = run / f"{len(stages)}_{stages[-1]['stage']}" / "model"
    if not last.exists():
        raise UsageError(f"the run {str(run)!r} has not finished: {str(last)!r} is missing")
    return stages


def curve_of(folder: Path, before: int) -> list[dict[str, float]]:
    """Perplexity on the run's own validation text by tokens since its first stage began."""
    log = folder / "validation_log.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [{"tokens": before + entry["tokens"], "perplexity": entry["perplexity"]} for entry in entries]


def measured(model: str, args: argparse.Namespace) -> dict[str, Any]:
    loaded, tokenizer = load(model, dtype="float32")
    source = TextSource(args.validation_file)
    tokens: Tensor = token_blocks(source, tokenizer, args.context_length, args.max_eval_tokens)
    print(f"{model}: {describe(loaded)}", file=sys.stderr, flush=True)
    found = perplexity(loaded, tokens, args.context_length)
    return {
        "attention": describe(loaded), "perplexity": found.perplexity, "standard_error": found.standard_error,
        "tokens_measured": found.tokens, "nll": list(found.nll),
    }  # fmt: skip


def compare(models: dict[str, dict[str, Any]]) -> None:
    """Fill in the paired ratios."""
    of = {key: Perplexity(0, tuple(model["nll"])) for key, model in models.items()}
    for key, model in models.items():
        model.pop("ratio", None), model.pop("beside_window", None)
        if key == ORIGINAL:
            continue
        stages = model["stages"]
        control = alike(models, stages, CONTROL, since=-1)
        if stages[-1]["stage"] == "distill":
            control = teacher(key, stages)
        if control in of and control != key:
            model["ratio"] = ratio(of[key], of[control])
        beside = alike(models, stages, BESIDE)
        if attention(stages) != CONTROL and beside in of and beside != key:
            model["beside_window"] = ratio(of[key], of[beside])


def attention(stages: list[dict[str, Any]]) -> str:
    """What the last of the stages trains."""
    return [stage["attention"] for stage in stages if "attention" in stage][-1]


def teacher(key: str, stages: list[dict[str, Any]]) -> str:
    """The key of the model that the last swap was made of."""
    swapped = max(number for number, stage in enumerate(stages) if "attention" in stage)
    return f"{key.split('/')[0]}/{label(stages[:swapped])}" if swapped else ORIGINAL


def label(stages: list[dict[str, Any]]) -> str:
    """What the last of the stages is called: `distill`, and `distill 2` where it is the second."""
    name = stages[-1]["stage"]
    count = sum(stage["stage"] == name for stage in stages)
    return name if count == 1 else f"{name} {count}"


def alike(models: dict[str, Any], ours: list[dict[str, Any]], name: str, since: int = 0) -> str | None:
    """The key of the model with attention `name` whose stages were `ours`, from number `since` on."""

    def training(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = [stage for stage in stages if stage["stage"] != "align"][since:]
        return [{name: value for name, value in stage.items() if name not in ASIDE} for stage in kept]

    for key, other in models.items():
        stages = other.get("stages")
        if stages and attention(stages) == name and training(stages) == training(ours):
            return key
    return None


def markdown(report: dict[str, Any]) -> str:
    models = report["models"]
    same = "trained the same way (95 %)"
    rows = [
        f"| run | stage | training tokens | minutes | perplexity | / softmax {same} | / `window` {same} |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, model in models.items():
        run, _, stage = key.partition("/")
        trained = [f"{model.get('tokens', 0):,}", f"{model.get('seconds', 0) / 60:.0f}"]
        cells = [run, stage or "-", *trained, f"{model['perplexity']:.2f}"]
        cells += [cell(model.get(name)) for name in ("ratio", "beside_window")]
        rows.append(f"| {' | '.join(cells)} |")
    few = any(model.get("ratio", {}).get("few") for model in models.values())
    return "\n".join(
        [
            "# Quality after conversion",
            "",
            f"{report['original']}, perplexity on {models[ORIGINAL]['tokens_measured']:,} tokens of {report['text']} "
            f"at context {report['context']}. After distill it is compared with its teacher (the original, or what "
            "the finetune before made of it), after finetune with softmax fine-tuned alike; - where no run was.",
            "",
            *rows,
            "",
            *(["`*`: fewer than 500 blocks, so the interval is rough.", ""] if few else []),
            "Perplexity on the validation text of the runs, by training tokens:",
            "",
            "| run | curve |",
            "|---|---|",
            *(f"| {run} | {line} |" for run, line in curves(models).items()),
            "",
            f"`{report['command']}`, {report['date']}, {report['machine'].get('processor', '')}.",
            "",
        ]
    )


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    mark = "*" if found["few"] else ""
    return f"{found['value']:.3f}{mark} ({found['low']:.3f} to {found['high']:.3f}), {found['verdict']}"


def curves(models: dict[str, dict[str, Any]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, model in models.items():
        points = "; ".join(f"{p['tokens']:,}: {p['perplexity']:.1f}" for p in model.get("curve", []))
        if points:
            run = key.partition("/")[0]
            found[run] = f"{found[run]}; {points}" if run in found else points
    return found


if __name__ == "__main__":
    with one_line_errors("quality"):
        torch.manual_seed(0)
        main()
