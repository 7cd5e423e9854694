"""Hold the command that compares every arm on one model, as a report."""

import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..evaluation.tasks import RETRIEVAL, RETRIEVAL_LENGTHS, help_text
from .options import (
    AllowPickle,
    DatasetConfig,
    DatasetName,
    Device,
    Dtype,
    Json,
    Model,
    Revision,
    Seed,
    TextColumn,
    TrainFile,
    TrustRemoteCode,
    ValidationFile,
    show,
    text_source,
)


def tradeoff(
    model: Model,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="new, empty, or of an interrupted run")],
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    dataset_name: DatasetName = None,
    dataset_config_name: DatasetConfig = None,
    text_column: TextColumn = "text",
    arms: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            help="a variant, options after a colon: relu_power:p=8, elu:layers=1::2; or the folder of a "
            "conversion; may be repeated",
        ),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls/--no_controls",
            help="add softmax, none, window, the linear part alone, and for arms with a state the windows of equal "
            "state and of equal time",
        ),
    ] = True,
    context_lengths: Annotated[
        list[int] | None, typer.Option("--context_length", min=2, help="of perplexity; may be repeated")
    ] = None,
    max_eval_tokens: Annotated[
        int | None, typer.Option("--max_eval_tokens", min=1, help="per context length; left out: 500 blocks")
    ] = None,
    lengths: Annotated[list[int] | None, typer.Option("--length", min=1, help="of speed; may be repeated")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="of speed, arms taking turns")] = 3,
    decode_tokens: Annotated[int, typer.Option("--decode_tokens", min=1)] = 4,
    align_tokens: Annotated[int, typer.Option("--align_tokens", min=0, help="0 leaves the arms untrained")] = 16384,
    block_size: Annotated[int, typer.Option("--block_size", min=2, help="of training")] = 512,
    learning_rate: Annotated[float | None, typer.Option("--learning_rate", help="of the alignment")] = None,
    per_device_train_batch_size: Annotated[int, typer.Option("--per_device_train_batch_size", min=1)] = 1,
    diagnose_tokens: Annotated[
        int, typer.Option("--diagnose_tokens", min=0, help="of the text for gradients and layers; 0 leaves them out")
    ] = 0,
    train_lengths: Annotated[
        list[int] | None,
        typer.Option("--train_length", min=2, help="of the lengths: time a training step too; may be repeated"),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help=f"{help_text()}; left out: {','.join(RETRIEVAL)}; '' for none",
        ),
    ] = None,
    task_lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--task_length",
            min=2,
            help="of texts that tasks make; may be repeated; left out: the context lengths, or, where --tasks is left "
            f"out too, those of {', '.join(map(str, RETRIEVAL_LENGTHS))} that no length above exceeds",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="items per task")] = None,
    include_path: Annotated[str | None, typer.Option("--include_path", help="a folder of tasks for lm-eval")] = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    revision: Revision = None,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Measure what each attention costs in quality and gains in speed on a model: report.json, .md, .html and plots.

    A bar shows how much of the whole run is done. The same command goes on where it was interrupted.

    Example: attnswap tradeoff HuggingFaceTB/SmolLM2-135M-Instruct --train_file book.txt --output_dir report
    """
    from .. import report
    from ..evaluation.tasks import retrieval_lengths
    from ..integration.objectives import objective
    from ..sources.lock import alone_in
    from ..sources.models import load
    from ..tradeoff import DEFAULT_ARMS, Settings, measure, with_controls
    from ..training.align import DEFAULT_LEARNING_RATE
    from .progress import RunBar

    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise UsageError(f"--learning_rate is {learning_rate}; expected a number above 0")
    arms = arms or DEFAULT_ARMS
    labels = with_controls(arms) if controls else arms
    settings = Settings(
        arms=tuple(labels), context_lengths=tuple(context_lengths or [512]), max_eval_tokens=max_eval_tokens,
        lengths=tuple(lengths or [512, 1536]), rounds=rounds, decode_tokens=decode_tokens, align_tokens=align_tokens,
        block_size=block_size, learning_rate=DEFAULT_LEARNING_RATE if learning_rate is None else learning_rate,
        per_device_train_batch_size=per_device_train_batch_size, seed=seed, diagnose_tokens=diagnose_tokens,
        tasks=tuple(name for name in (tasks or "").split(",") if name), task_limit=limit, include_path=include_path,
        task_lengths=tuple(task_lengths or ()), train_lengths=tuple(train_lengths or ()), equal_controls=controls,
    )  # fmt: skip
    training = text_source(train_file, dataset_name, dataset_config_name, "train", text_column)
    evaluation = None if validation_file is None else text_source(validation_file, None, None, "train", text_column)
    with alone_in(output_dir), RunBar() as bar:
        loaded, tokenizer = load(
            model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )  # fmt: skip
        if tasks is None and objective(loaded) == "next tokens":
            longest = max(*settings.context_lengths, *settings.lengths)
            at = settings.task_lengths or retrieval_lengths(loaded, longest)
            settings = replace(settings, tasks=RETRIEVAL if at else (), task_lengths=at)
        measured = measure(
            loaded,
            tokenizer,
            training,
            evaluation,
            settings,
            output_dir,
            model_name=Path(model).name if Path(model).exists() else model,
            command=shlex.join(["attnswap", *map(_without_folders, sys.argv[1:])]),
            observe=bar,
        )
        written = report.write_all(measured, output_dir)
    print("\n".join(str(path) for path in written), file=sys.stderr)
    # Last, so that the verdict, and where the page is, stand where a person looks.
    show(as_json, report.to_json(measured), report.show(measured, output_dir / "report.html"))


def _without_folders(argument: str) -> str:
    """Return an argument without the folders of an absolute path, which say nothing to others."""
    return Path(argument).name if Path(argument).is_absolute() else argument
