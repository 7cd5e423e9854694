"""Hold the command that finds which key/value groups of a model keep softmax."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    AllowPickle,
    DatasetConfig,
    DatasetName,
    Device,
    Dtype,
    Json,
    Kinds,
    Model,
    Options,
    Revision,
    Seed,
    TextColumn,
    TrainFile,
    TrustRemoteCode,
    ValidationFile,
    show,
    text_source,
)


def plan(
    model: Model,
    budget: Annotated[
        list[str],
        typer.Option(
            "--budget", help="groups=1/4, ppl<=1.02, cache<=0.3 at 8192 or prefill>=1.5 at 8192; may be repeated"
        ),
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="new, empty, or of an interrupted run")],
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    dataset_name: DatasetName = None,
    dataset_config_name: DatasetConfig = None,
    text_column: TextColumn = "text",
    attention: Annotated[str, typer.Option("--attention", help="what stands where softmax is not kept")] = "window",
    option: Options = None,
    kind: Kinds = None,
    context_length: Annotated[int, typer.Option("--context_length", min=2, help="tokens of a text")] = 1024,
    steps: Annotated[int, typer.Option("--steps", min=1, help="gradients of the search, the first 8 to score")] = 28,
    texts: Annotated[int, typer.Option("--texts", min=1, help="held-out texts; an interval needs 8")] = 8,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    revision: Revision = None,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Find which key/value groups keep softmax within a budget: plan.yaml, pareto.json and a plot. Trains nothing.

    Groups are scored and searched on the training text, and the plan is verified by real swaps on held-out text. The
    same command goes on where it was interrupted. `--plan` of convert, tradeoff and training takes plan.yaml.

    Example: attnswap plan HuggingFaceTB/SmolLM2-135M-Instruct --train_file book.txt --budget groups=1/4 --output_dir p
    """
    from ..config import parse_options
    from ..planning.budgets import parse_budgets
    from ..planning.files import paths
    from ..planning.running import run
    from ..planning.settings import Settings
    from ..sources.models import load
    from .progress import RunBar

    parse_budgets(budget)
    settings = Settings.of(budget, attention, parse_options(option or []), kind, context_length, steps, texts, seed)
    training = text_source(train_file, dataset_name, dataset_config_name, "train", text_column)
    held_out = None if validation_file is None else text_source(validation_file, None, None, "train", text_column)
    with RunBar() as bar:
        loaded, tokenizer = load(
            model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )  # fmt: skip
        outcome = run(loaded, tokenizer, training, held_out, settings, output_dir, bar)
    show(as_json, outcome.as_dict(), outcome.table(), *outcome.lines())
    print("\n".join(map(str, paths(output_dir))), file=sys.stderr)
