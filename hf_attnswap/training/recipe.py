"""Convert a model by a recipe: a YAML file that chains align, distill and finetune.

The keys of a recipe are the arguments of the stages' scripts, without the dashes: those at the top hold for every stage
that knows them, those of a stage for it alone. `options` are those of the variant. Without `stages`, the recipe of the
variant's family is taken, which shares `max_train_tokens` out. Each stage begins with the model of the one before it;
the command that runs it alone is printed. After stages with `attention: softmax`, which train the original, a stage may
name another attention: what it swaps, and what teaches from there on, is the model as trained so far.

    model_name_or_path: HuggingFaceTB/SmolLM2-135M
    attention: hedgehog+window
    options: {window: 64, sinks: 4}
    train_file: book.txt
    stages:
      - {stage: align, max_train_tokens: 200000}
      - {stage: distill, max_train_tokens: 500000, learning_rate: 1.0e-4}
      - {stage: finetune, max_train_tokens: 300000, block_size: 1024}

    accelerate launch examples/convert.py --recipe recipe.yaml --output_dir converted

A run that was cut off goes on when the same command is given again: from its newest checkpoint (`checkpointing_steps`)
in the stage in which it stopped.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import align_attention
import distill
import finetune
import yaml
from launch import build_accelerator, say, start

from hf_attnswap import UsageError, attentions
from hf_attnswap.attentions.base import suggestion
from hf_attnswap.errors import one_line_errors
from hf_attnswap.sources.files import write_whole

OUTPUT = """\
output_dir:
  recipe.yaml          the stages as they run, with what they take from the top and from the family
  1_align/, 2_distill/ ... the output of each stage; `model` in the last one is the conversion
"""
SCRIPTS = {"align": align_attention, "distill": distill, "finetune": finetune}
# What convert itself says to each stage.
OURS = ("output_dir", "resume_from_checkpoint", "help")

# What the papers train with, and how the tokens of a run are shared out. LoLCATs (Zhang 2024): alignment of the maps
# with AdamW at 1e-2. RADLADS (Goldstein 2025): alignment of whole attention modules on a cosine from 1e-3 to 1e-5, then
# the divergence of the logits with all weights, on a few times as many tokens; here without the embeddings, and at a
# rate for fewer tokens. Variants with maps take both alignments, and a higher rate for the maps than for the weights
# around them: on few tokens the second alignment gains more than a distillation as long (benchmarks/results/README.md).
_MAPS = {"stage": "align", "learning_rate": align_attention.DEFAULT_LEARNING_RATE}
_MODULES = {
    "stage": "align", "train": "attention",
    "learning_rate": align_attention.DEFAULT_PROJECTIONS_LEARNING_RATE, "final_learning_rate": 1e-5,
}  # fmt: skip
_DISTILL = {"stage": "distill", "learning_rate": distill.DEFAULT_LEARNING_RATE, "freeze_embeddings": True}
_WITHOUT_MAPS = [(0.25, _MODULES), (0.75, _DISTILL)]
_WITH_MAPS = [
    (0.05, _MAPS),
    (0.35, {**_MODULES, "learning_rate": 2e-3, "new_parameters_learning_rate": 1e-2}),
    (0.6, {**_DISTILL, "new_parameters_learning_rate": 5e-4}),
]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=OUTPUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, required=True, help="a YAML file, see above")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder, or that of the run to go on with")
    args = parser.parse_args(argv)
    stages = read_recipe(args.recipe)
    accelerator = build_accelerator()
    keep(accelerator, stages, args.output_dir / "recipe.yaml")
    model = teacher = stages[0][1]["model_name_or_path"]
    original = True  # whether the model with softmax switched on is the teacher still
    for number, (name, given) in enumerate(stages, start=1):
        folder = args.output_dir / f"{number}_{name}"
        given = {**given, "model_name_or_path": model}
        if given.get("attention"):
            teacher, original = model, True
        if name == "distill" and not original:
            given.setdefault("teacher_name_or_path", teacher)
        original = original and name == "align" and given.get("train") != "attention"
        model = str(folder / "model")
        if Path(model).exists():
            say(accelerator, f"{folder.name} is done")
            continue
        command = [*arguments(given), "--output_dir", str(folder)]
        say(accelerator, f"{folder.name}: {SCRIPTS[name].__name__}.py {shlex.join(command)}")
        parsed = SCRIPTS[name].build_parser().parse_args([*command, "--resume_from_checkpoint", "latest"])
        own = start(parsed)
        SCRIPTS[name].stage(parsed, own)
        own.free_memory()
    accelerator.end_training()


Stage = tuple[str, dict[str, Any]]  # its name, and the arguments of its script


def read_recipe(path: Path) -> list[Stage]:
    """The stages of a recipe, each with all its arguments.

    Raises:
        UsageError: not a recipe, with the key or value, and what was probably meant.
    """
    try:
        recipe = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"recipe {str(path)!r} does not exist") from None
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise UsageError(
            f"recipe {str(path)!r} holds {recipe!r}; expected keys such as model_name_or_path and attention"
        )
    for key in ("model_name_or_path", "attention"):
        if key not in recipe:
            raise UsageError(f"recipe {str(path)!r} has no {key}")
    shared = {key: value for key, value in recipe.items() if key != "stages"}
    known = {name: known_keys(name) for name in SCRIPTS}
    check_keys(f"recipe {str(path)!r}", shared, {"stages"}.union(*known.values()))
    stages = recipe.get("stages")
    if stages is None:
        stages = family_stages(shared)
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UsageError(f"stages in recipe {str(path)!r} is {stages!r}; expected a list such as [{{stage: align}}]")
    found, swapped = [], "softmax"
    for number, stage in enumerate(stages, start=1):
        name = stage.get("stage")
        if name not in SCRIPTS:
            raise UsageError(
                f"stage {number} of recipe {str(path)!r} is {name!r}.{suggestion(str(name), SCRIPTS)} "
                f"Stages: {', '.join(SCRIPTS)}"
            )
        own = {key: value for key, value in stage.items() if key != "stage"}
        check_keys(f"stage {number} ({name}) of recipe {str(path)!r}", own, known[name])
        length = {"max_train_tokens", "max_train_steps"}
        hidden = length if length & own.keys() else set()
        if number > 1:  # its model comes swapped
            hidden = hidden | {"attention", "layers", "options"}
        taken = {key: value for key, value in shared.items() if key in known[name] and key not in hidden}
        found.append((name, {**taken, **own}))
        check_arguments(f"stage {number} ({name}) of recipe {str(path)!r}", name, found[-1][1])
        attention = found[-1][1].get("attention")
        if attention and swapped != "softmax":
            raise UsageError(
                f"stage {number} ({name}) of recipe {str(path)!r} swaps to {attention!r} what is {swapped!r} already: "
                "name one attention, after stages with softmax if any"
            )
        swapped = attention or swapped
    return found


def known_keys(stage: str) -> set[str]:
    own = {action.dest for action in SCRIPTS[stage].build_parser()._actions} - set(OURS) - {"option"}
    return own | {"options"}


def check_keys(where: str, given: dict[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            raise UsageError(
                f"{where} has an unknown key {key!r}.{suggestion(key, known)} Known: {', '.join(sorted(known))}"
            )


def check_arguments(where: str, stage: str, given: dict[str, Any]) -> None:
    """UsageError where the script of the stage would not take these arguments."""
    parser = SCRIPTS[stage].build_parser()

    def refuse(message: str) -> None:
        raise UsageError(f"{where}: {message}")

    parser.error = refuse
    parser.parse_args([*arguments(given), "--output_dir", "."])


def arguments(given: dict[str, Any]) -> list[str]:
    """As on the command line of a script."""
    found = []
    for key, value in given.items():
        if key == "options":
            for name, option in value.items():
                found += ["--option", f"{name}={str(option).lower() if isinstance(option, bool) else option}"]
        elif value is True:
            found.append(f"--{key}")
        elif isinstance(value, list):
            found += [f"--{key}", ",".join(map(str, value))]
        elif value is not None and value is not False:
            found += [f"--{key}", str(value)]
    return found


def family_stages(shared: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages for a kind of variant, with their tokens."""
    tokens = shared.get("max_train_tokens")
    if type(tokens) is not int:
        raise UsageError(f"a recipe without stages needs max_train_tokens, which is {tokens!r}")
    try:
        variant = attentions.get(shared["attention"])
    except ValueError as error:
        raise UsageError(str(error)) from None
    options = shared.get("options") or {}
    try:
        learns = next(variant(attentions.Heads(1, 1, 8), **options).parameters(), None) is not None
    except ValueError as error:
        raise UsageError(str(error)) from None
    plan = _WITH_MAPS if learns and variant.cost_class == "linear" else _WITHOUT_MAPS
    stages = [{**stage, "max_train_tokens": int(tokens * share)} for share, stage in plan]
    if "gain" in variant.options():
        stages[0]["options"] = {"gain": True, **options}
    return stages


def keep(accelerator, stages: list[Stage], path: Path) -> None:
    """Write the stages down; UsageError where the folder holds a run of other ones."""
    text = yaml.safe_dump({"stages": [{"stage": name, **given} for name, given in stages]}, sort_keys=False)
    accelerator.wait_for_everyone()
    if path.exists():
        before = yaml.safe_load(path.read_text())["stages"]
        for number, ((name, given), was) in enumerate(zip(stages, before, strict=False), start=1):
            now = {"stage": name, **given}
            for key in [*now, *was]:
                if now.get(key) != was.get(key):
                    raise UsageError(
                        f"{str(path.parent)!r} holds a run whose stage {number} has {key} = {was.get(key)!r}, not "
                        f"{now.get(key)!r}: give the same recipe, or another output_dir"
                    )
        if len(before) != len(stages):
            raise UsageError(
                f"{str(path.parent)!r} holds a run of {len(before)} stages, not {len(stages)}: give the same recipe, "
                "or another output_dir"
            )
    elif path.parent.is_dir() and any(path.parent.iterdir()):
        raise UsageError(f"output folder {str(path.parent)!r} is not empty, and holds no run of a recipe")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    with one_line_errors("convert"):
        main()
