"""Define the command `python -m hf_attnswap.training`, which runs one stage, or a recipe that chains several."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from . import conversion, recipe, stages
from .options import Parser, add_options, parse
from .run import start

PROGRAM = "hf_attnswap.training"
OUTPUT = """\
output_dir:
  model/               the finished model with its tokenizer; it appears whole, at the end
  checksums.json       of the files in model/, which are checked where a stage goes on from them
  stage.json           what trained, and the options that differ from their defaults
  checkpoints/step_N/  the two newest checkpoints, for --resume_from_checkpoint; can be removed once model/ is there
  training_log.jsonl   one line per step
  validation_log.jsonl one line per --validation_steps, where --validation_file is given
"""
OUTPUT_OF_A_RECIPE = """\
A run that was cut off goes on where it stopped when its command is given again.

output_dir:
  recipe.yaml          the stages as they run
  1_align/, 2_distill/ ... the output of each stage; `model` in the last one is the conversion
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage that the first word names, or the recipe that --recipe names.

    Args:
        argv: the words of the command line; None for those of this process.

    Raises:
        UsageError: an unknown stage, recipe or option, or an unfit value.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
    elif words[0].startswith("-"):
        run_recipe(words)
    else:
        run_stage(words[0], words[1:])


def run_stage(name: str, words: Sequence[str]) -> None:
    """Run one stage with the options on its command line, and end the group of its processes."""
    stage = stages.get(name)
    text = importlib.import_module(stage.__module__).__doc__ or stage.__doc__
    options = parse(
        stage, words, prog=f"{PROGRAM} {name}", usage=f"{PROGRAM} {name} [options]", description=text, epilog=OUTPUT
    )
    with start(options) as accelerator:
        options.run(accelerator)
    accelerator.end_training()


def run_recipe(words: Sequence[str]) -> None:
    """Run a recipe; options on the command line replace those at the top of the recipe."""
    parser = Parser(
        prog=PROGRAM, usage=f"{PROGRAM} --recipe NAME_OR_FILE [options]", description=recipe.__doc__,
        epilog=OUTPUT_OF_A_RECIPE,
    )  # fmt: skip
    parser.add_argument(
        "--recipe", required=True, metavar="NAME_OR_FILE", help=f"{', '.join(recipe.names())}, or a file"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder, or that of the run to go on with")
    for stage in stages.available().values():
        add_options(parser, stage, optional=True, without=recipe.SET_BY_THE_RUN)
    given = vars(parser.parse_args(list(words)))
    name, output_dir = given.pop("recipe"), given.pop("output_dir")
    conversion.convert(recipe.read_recipe(name, recipe.options_of_arguments(given)), output_dir)


def overview() -> str:
    """Return what `--help` without a stage prints: the stages and the recipes."""
    lines = [
        f"usage: accelerate launch -m {PROGRAM} STAGE [options]",
        f"       accelerate launch -m {PROGRAM} --recipe NAME_OR_FILE [options]",
        "",
        "Train a swapped model, on one process or several. A run that was cut off goes on: a stage with",
        "--resume_from_checkpoint latest, a recipe when the same command is given again.",
        "",
        "stages:",
        *(f"  {name:10} {(stage.__doc__ or '').splitlines()[0]}" for name, stage in stages.available().items()),
        "",
        "recipes:",
        *(f"  {name:10} {recipe.describe(name)}" for name in recipe.names()),
        "",
        f"`python -m {PROGRAM} STAGE --help` lists the options of a stage, `--recipe NAME --help` those of a recipe.",
    ]
    return "\n".join(lines)
