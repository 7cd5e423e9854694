"""The commands that measure: evaluate and tradeoff."""

import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import UsageError
from .options import (
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
    table_of,
    text_source,
)


def evaluate(
    model: Model,
    validation_file: Annotated[str | None, typer.Option("--validation_file", help="text, json, parquet or csv")] = None,
    dataset_name: DatasetName = None,
    dataset_config_name: DatasetConfig = None,
    split: Annotated[str, typer.Option("--split", help="of the dataset")] = "test",
    text_column: TextColumn = "text",
    context_lengths: Annotated[
        list[int] | None, typer.Option("--context_length", min=2, help="may be repeated")
    ] = None,
    max_eval_tokens: Annotated[int, typer.Option("--max_eval_tokens", min=1)] = 16384,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="windows of the context move on by so many tokens")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Perplexity of a model, swapped or not, by context length and position, with the standard error.

    Example: attnswap evaluate relu16 --validation_file book.txt --context_length 512 --context_length 2048
    """
    from ..data import token_blocks
    from ..evaluation.perplexity import count_units, perplexity, sliding_perplexity
    from ..loading import load
    from ..patching import describe

    source = text_source(validation_file, dataset_name, dataset_config_name, split, text_column)
    contexts = context_lengths or [512]
    if stride and stride >= min(contexts):
        raise UsageError(f"stride is {stride}; expected less than the context of {min(contexts)}")
    loaded, tokenizer = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tokens = token_blocks(source, tokenizer, max(contexts), max(max_eval_tokens, max(contexts)))
    rows = []
    for context in contexts:
        found = sliding_perplexity(loaded, tokens, context, stride) if stride else perplexity(loaded, tokens, context)
        rows.append(_perplexity_row(loaded, found, count_units(tokenizer, tokens, context, len(found.nll), stride)))
    columns = {"context": "context", "perplexity": "perplexity", "nll_per_token": "nll"}
    columns |= {"standard_error": "standard_error", "per_word": "word_perplexity", "per_byte": "byte_perplexity"}
    tables = [table_of(f"{model}: {describe(loaded)}", rows, **columns, tokens="tokens", note="note")]
    positions = [p | {"context": row["context"]} for row in rows for p in row["by_position"]]
    if positions:
        columns = {"context": "context", "positions_from": "first", "to": "last", "perplexity": "perplexity"}
        tables.append(table_of("by position in the context", positions, **columns))
    show(as_json, {"model": model, "attention": describe(loaded), "perplexity": rows}, *tables)


def _perplexity_row(model, found, units) -> dict[str, Any]:
    trained = getattr(model.config, "max_position_embeddings", None)
    return {
        "context": found.context,
        "stride": found.stride,
        "perplexity": found.perplexity,
        "nll": found.mean,
        "standard_error": found.standard_error,
        "tokens": found.tokens,
        "word_perplexity": found.per(units.words) if units.words else None,
        "byte_perplexity": found.per(units.bytes) if units.bytes else None,
        "words": units.words,
        "bytes": units.bytes,
        "by_position": [
            {"first": first, "last": last, "nll": nll, "perplexity": math.exp(min(nll, 700))}
            for first, last, nll in found.by_position
        ],
        "note": f"beyond the {trained} of its config" if trained and found.context > trained else "",
    }


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
        typer.Option("--arm", help="a variant, options after a colon: relu_power:p=8; may be repeated"),
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls/--no_controls", help="add softmax, none, window and the linear part alone")
    ] = True,
    context_lengths: Annotated[
        list[int] | None, typer.Option("--context_length", min=2, help="of perplexity; may be repeated")
    ] = None,
    max_eval_tokens: Annotated[int, typer.Option("--max_eval_tokens", min=1, help="per context length")] = 4096,
    lengths: Annotated[list[int] | None, typer.Option("--length", min=1, help="of speed; may be repeated")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="of speed, arms taking turns")] = 3,
    decode_tokens: Annotated[int, typer.Option("--decode_tokens", min=1)] = 4,
    align_tokens: Annotated[int, typer.Option("--align_tokens", min=0, help="0 leaves the arms untrained")] = 16384,
    block_size: Annotated[int, typer.Option("--block_size", min=2, help="of training")] = 512,
    learning_rate: Annotated[float | None, typer.Option("--learning_rate", help="of the alignment")] = None,
    per_device_train_batch_size: Annotated[int, typer.Option("--per_device_train_batch_size", min=1)] = 1,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    revision: Revision = None,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """What each attention costs in quality and gains in speed on a model: report.json, .md, .html and plots.

    Example: attnswap tradeoff HuggingFaceTB/SmolLM2-135M-Instruct --train_file book.txt --output_dir report
    """
    from .. import report
    from ..loading import load
    from ..tradeoff import DEFAULT_ARMS, Arm, Settings, measure, with_controls
    from ..training.align import DEFAULT_LEARNING_RATE

    arms = arms or DEFAULT_ARMS
    labels = with_controls(arms) if controls else [Arm.parse(arm).label for arm in arms]
    settings = Settings(
        arms=tuple(labels), context_lengths=tuple(context_lengths or [512]), max_eval_tokens=max_eval_tokens,
        lengths=tuple(lengths or [512, 1536]), rounds=rounds, decode_tokens=decode_tokens, align_tokens=align_tokens,
        block_size=block_size, learning_rate=learning_rate or DEFAULT_LEARNING_RATE,
        per_device_train_batch_size=per_device_train_batch_size, seed=seed,
    )  # fmt: skip
    training = text_source(train_file, dataset_name, dataset_config_name, "train", text_column)
    evaluation = None if validation_file is None else text_source(validation_file, None, None, "train", text_column)
    console = Console(stderr=True)
    with console.status("loading the model") as status:
        loaded, tokenizer = load(
            model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
        )

        def progress(line: str) -> None:
            status.update(line)
            if not console.is_terminal and "alignment step" not in line:
                print(line, file=sys.stderr, flush=True)

        found = measure(
            loaded,
            tokenizer,
            training,
            evaluation,
            settings,
            output_dir,
            model_name=Path(model).name if Path(model).exists() else model,
            command=shlex.join(["attnswap", *sys.argv[1:]]),
            progress=progress,
        )
        status.update("drawing the report")
        written = report.write_all(found, output_dir)
    show(as_json, found, report.show(found))
    print("\n".join(str(path) for path in written), file=sys.stderr)
