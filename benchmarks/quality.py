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
anything? Where no run was trained alike, the table says so by a dash. What keeps a state must also beat the windows of
the same cache bytes and of the same time: where no run is such a window, trained alike, the report names it.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from figures import command, named
from rich.console import Console
from torch import Tensor

from hf_attnswap import UsageError
from hf_attnswap import report as reports
from hf_attnswap.config import NAME
from hf_attnswap.errors import one_line_errors
from hf_attnswap.evaluation.perplexity import Perplexity, block_perplexity
from hf_attnswap.integration.swapping import describe, restore, softmax_groups, swapped_modules
from hf_attnswap.plans import layers_in
from hf_attnswap.report import facts, types
from hf_attnswap.report.types import Data, Report
from hf_attnswap.sources.blocks import start_tokens
from hf_attnswap.sources.conversions import find
from hf_attnswap.sources.files import write_whole
from hf_attnswap.sources.models import load
from hf_attnswap.sources.texts import TextSource, token_blocks
from hf_attnswap.statistics import FEW
from hf_attnswap.tradeoff import Arm, describe_model, machine, now, share_weights, versions
from hf_attnswap.tradeoff.controls import equal_windows, has_controls, is_close
from hf_attnswap.tradeoff.rows import describe as variants
from hf_attnswap.tradeoff.rows import perplexity_ratio

ORIGINAL, CONTROL, BESIDE, CONTROLS = "original", "softmax", "window", "controls.json"
# Of the arguments of a stage, those that make it no other training: what stands in the layers, and what is looked at.
ASIDE = frozenset(
    "attention options layers keep plan new_parameters_learning_rate validation_file validation_steps "
    "max_validation_tokens checkpointing_steps".split()
)
OUTPUT = """\
output_dir:
  report.json          everything, the nll of each block too; what it holds of a run is not measured again
  report.md, .html     the tables
  controls.json        the windows of equal state and of equal time of each model with a state
  RUN/recipe.yaml      the stages of each run, with all their arguments
"""


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the script; return what it writes to report.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=OUTPUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a folder that the run of a recipe left")
    parser.add_argument("--validation_file", required=True, help="text that no run trained on")
    parser.add_argument("--context_length", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--max_eval_tokens", type=int, help="(default: 500 blocks, or as many as the text has)")
    told = "tokens at which windows have equal state and equal time (default: %(default)s)"
    parser.add_argument("--length", type=int, default=2048, help=told)
    parser.add_argument("--output_dir", type=Path, required=True, help="see below")
    args = parser.parse_args(argv)
    args.max_eval_tokens = args.max_eval_tokens or FEW * args.context_length
    recipes = {run.name: read(run) for run in args.runs}
    original = next(iter(recipes.values()))[0]["model_name_or_path"]
    for name, stages in recipes.items():
        if stages[0]["model_name_or_path"] != original:
            raise UsageError(f"run {name!r} began with {stages[0]['model_name_or_path']!r}, others with {original!r}")
    settings = {"context": args.context_length, "max_eval_tokens": args.max_eval_tokens}
    path, text = args.output_dir / "report.json", named(args.validation_file)
    before = reports.read(path) if path.exists() else None
    if before and (before.settings, before.data.evaluation) != (settings, text):
        raise UsageError(f"{str(path)!r} was measured on other text: name another output_dir")
    known = {arm.label: arm for arm in before.arms} if before else {}
    windows: dict[str, list[dict[str, Any]]] = {}
    if before and (args.output_dir / CONTROLS).exists():
        windows = json.loads((args.output_dir / CONTROLS).read_text())
    arms = {label: arm for label, arm in known.items() if label.split("/")[0] not in recipes}
    shape = before.model if before else None

    def report() -> Report:
        measured_tokens = arms[ORIGINAL].perplexity[0].tokens
        texts = dict.fromkeys(stage.text for arm in arms.values() for stage in arm.training)
        return Report(
            kind="quality", title=f"Quality after conversion of {named(original)}", model=shape,
            machine=machine(torch.device("cpu")), versions=versions(), date=now(), command=command(argv), seeds=[0],
            data=Data(", ".join(texts), max(arm.training_tokens for arm in arms.values()), text, measured_tokens),
            arms=list(arms.values()), settings=settings,
        )  # fmt: skip

    def measure(label: str, model: str, about: dict[str, Any]) -> None:
        nonlocal shape
        arm = known.get(label)
        stages, tokens = stages_of(about.get("training", [])), about.get("training_tokens", 0)
        if arm is None or (stages_of(arm.training), arm.training_tokens) != (stages, tokens):
            arm, shape, windows[label] = measured(label, model, about, args, named(original))
            write_whole(args.output_dir / CONTROLS, json.dumps(windows, indent=1).encode())
        arms[label] = replace(arm, **about)
        reports.write(report(), path)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    measure(ORIGINAL, original, {})
    for run in args.runs:
        stages, so_far, seconds = recipes[run.name], 0, 0.0
        (args.output_dir / run.name).mkdir(parents=True, exist_ok=True)
        write_whole(
            args.output_dir / run.name / "recipe.yaml", yaml.safe_dump({"stages": stages}, sort_keys=False).encode()
        )
        trained: list[types.Stage] = []
        for number, stage in enumerate(stages, start=1):
            folder = run / f"{number}_{stage['stage']}"
            log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
            curve = curve_of(folder, so_far)
            so_far += log[-1]["tokens"]
            seconds += sum(entry["seconds"] for entry in log)
            trained.append(stage_of(stage, log))
            if stage["stage"] == "align":
                continue
            about = {"training": list(trained), "training_tokens": so_far, "training_seconds": float(round(seconds))}
            measure(f"{run.name}/{name_of(stages[:number])}", str(folder / "model"), about | {"curve": curve})
    compare(arms, windows)
    made = report()
    reports.write_all(made, args.output_dir)
    Console().print(reports.show(made, args.output_dir / "report.html"))
    return made


def stage_of(stage: dict[str, Any], log: list[dict[str, Any]]) -> types.Stage:
    """Return a stage with its arguments, from its recipe and its log."""
    given = {key: value for key, value in stage.items() if key != "stage"}
    text = Path(given.get("train_file") or given.get("dataset_name") or "").name
    rate = max(entry["learning_rate"] for entry in log)
    return types.Stage(
        stage["stage"], "", text, log[-1]["tokens"], len(log), rate, log[0]["loss"], log[-1]["loss"], arguments=given
    )


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


def curve_of(folder: Path, before: int) -> list[types.CurvePoint]:
    """Return the perplexity on the run's own validation text by tokens since its first stage began."""
    log = folder / "validation_log.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [types.CurvePoint(before + entry["tokens"], entry["perplexity"]) for entry in entries]


def measured(
    label: str, model: str, about: dict[str, Any], args: argparse.Namespace, original: str
) -> tuple[types.Arm, types.Model, list[dict[str, Any]]]:
    """Return the arm with its perplexity, the shape of the model, and the windows of equal state and time."""
    loaded, tokenizer = load(model, dtype="float32")
    source = TextSource(args.validation_file)
    tokens: Tensor = token_blocks(source, tokenizer, args.context_length, args.max_eval_tokens)
    print(f"{model}: {describe(loaded)}", file=sys.stderr, flush=True)
    result = block_perplexity(loaded, tokens, max(1, len(start_tokens(tokenizer))))
    saved = (getattr(loaded.config, NAME, None) or {}).get("swapped") or []
    names = list(dict.fromkeys(group["attention"] for group in saved)) or [CONTROL]
    shape = describe_model(loaded, original)
    kept = shape.attention_layers - len({layer for group in saved for layer in layers_in(group)})
    own = [p.numel() for variant in swapped_modules(loaded).values() for p in variant.parameters()]
    arm = types.Arm(
        label=label, attention=names[0] if len(names) == 1 else "mixed", options=saved[0]["options"] if saved else {},
        **variants(names[0] if len(names) == 1 else "mixed", saved, kept, list(softmax_groups(loaded))),
        swapped=[types.Group(**group) for group in saved], new_parameters=sum(own), status="measured",
        perplexity=[entry(result)], **about,
    )  # fmt: skip
    windows = []
    if has_controls(loaded):
        windows = equal_windows(Arm.of(find(model)), loaded, restore(share_weights(loaded)), args.length)
    return arm, shape, windows


def entry(result: Perplexity) -> types.Perplexity:
    """Return a perplexity as the report has it, the nll of every block with it."""
    error = None if math.isnan(result.standard_error) else result.standard_error
    return types.Perplexity(
        result.context, result.perplexity, result.mean, error, result.tokens, block_nll=list(result.nll)
    )


def compare(arms: dict[str, types.Arm], windows: dict[str, list[dict[str, Any]]]) -> None:
    """Fill in the paired ratios, and the controls of equal state and time."""
    for label, arm in arms.items():
        own = arm.perplexity[0]
        own.ratio, own.against = None, []
        if label == ORIGINAL:
            continue
        stages = stages_of(arm.training)
        control = alike(arms, stages, CONTROL, since=-1)
        if stages[-1]["stage"] == "distill":
            control = teacher(label, stages)
        if control in arms and control != label:
            own.ratio = beside(control, arms)(own)
        window = alike(arms, stages, BESIDE)
        if attention(stages) != CONTROL and window in arms and window != label:
            own.against = [beside(window, arms)(own)]
        arm.controls = [equal_control(found, label, arms) for found in windows.get(label, [])]
        known = {compared.arm for compared in (own.ratio, *own.against) if compared}
        more = dict.fromkeys(control.arm for control in arm.controls if control.arm not in known)
        own.against += [beside(name, arms)(own) for name in more if name]


def equal_control(found: dict[str, Any], label: str, arms: dict[str, types.Arm]) -> types.Control:
    """Return the run that is the window which was `found` for an arm, trained alike; or that there is none."""
    arm = arms[label]
    ratio = arm.perplexity[0].ratio
    if "window" not in found:
        return types.Control(found["equal"], ratio.arm if ratio and found.get("arm") else None, found["note"])
    parted = arm.attention == BESIDE  # a window in some groups, whose control stands in all
    for key in all_alike(arms, stages_of(arm.training), BESIDE):
        other = arms[key]
        same = not any(group.groups for group in other.swapped) if parted else facts.same_layers(arm, other)
        if key != label and same and is_close(other.options, found):
            return types.Control(found["equal"], key)
    wanted = f"window={found['window']}, sinks={found['sinks']}"
    return types.Control(found["equal"], None, f"no run is that of window with {wanted}, trained alike")


def beside(control: str, arms: dict[str, types.Arm]) -> Callable[[types.Perplexity], types.Comparison]:
    """Return what compares a perplexity with that of the arm `control`, block by block."""
    other = arms[control].perplexity[0]
    return lambda own: perplexity_ratio(control, *(Perplexity(0, tuple(e.block_nll)) for e in (own, other)))


def stages_of(training: list[types.Stage]) -> list[dict[str, Any]]:
    """Return stages with their arguments, as a recipe has them."""
    return [{"stage": stage.stage} | stage.arguments for stage in training]


def attention(stages: list[dict[str, Any]]) -> str:
    """What the last of the stages trains."""
    return [stage["attention"] for stage in stages if "attention" in stage][-1]


def teacher(key: str, stages: list[dict[str, Any]]) -> str:
    """The key of the model that the last swap was made of."""
    swapped = max(number for number, stage in enumerate(stages) if "attention" in stage)
    return f"{key.split('/')[0]}/{name_of(stages[:swapped])}" if swapped else ORIGINAL


def name_of(stages: list[dict[str, Any]]) -> str:
    """What the last of the stages is called: `distill`, and `distill 2` where it is the second."""
    name = stages[-1]["stage"]
    count = sum(stage["stage"] == name for stage in stages)
    return name if count == 1 else f"{name} {count}"


def alike(arms: dict[str, types.Arm], ours: list[dict[str, Any]], name: str, since: int = 0) -> str | None:
    """The key of the first model of `all_alike`."""
    return next(all_alike(arms, ours, name, since), None)


def all_alike(arms: dict[str, types.Arm], ours: list[dict[str, Any]], name: str, since: int = 0) -> Iterator[str]:
    """The keys of the models with attention `name` whose stages were `ours`, from number `since` on.

    A window that leaves groups on softmax is a plan, and no control of others.
    """

    def training(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = [stage for stage in stages if stage["stage"] != "align"][since:]
        return [{name: value for name, value in stage.items() if name not in ASIDE} for stage in kept]

    for key, other in arms.items():
        stages = stages_of(other.training)
        if name == BESIDE and any(group.groups for group in other.swapped):
            continue
        if stages and attention(stages) == name and training(stages) == training(ours):
            yield key


if __name__ == "__main__":
    with one_line_errors("quality"):
        torch.manual_seed(0)
        main()
