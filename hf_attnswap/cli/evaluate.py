"""Hold the command that measures quality: perplexity, tasks, and the difference to another model on the same items."""

import math
from itertools import islice
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..evaluation.tasks import help_text
from ..statistics import FEW, MIN_ITEMS
from .options import (
    AllowPickle,
    DatasetConfig,
    DatasetName,
    Device,
    Dtype,
    Json,
    Model,
    Seed,
    TextColumn,
    TrustRemoteCode,
    show,
    status,
    table_of,
    text_source,
)

PERPLEXITY = {
    "context": "context", "perplexity": "perplexity", "nll_per_token": "nll", "standard_error": "standard_error",
    "per_word": "word_perplexity", "per_byte": "byte_perplexity", "tokens": "tokens",
}  # fmt: skip
TASKS = {"task": "task", "metric": "metric", "value": "value", "standard_error": "standard_error", "items": "items"}


def evaluate(
    model: Model,
    validation_file: Annotated[str | None, typer.Option("--validation_file", help="text, json, parquet or csv")] = None,
    dataset_name: DatasetName = None,
    dataset_config_name: DatasetConfig = None,
    split: Annotated[str, typer.Option("--split", help="of the dataset")] = "test",
    text_column: TextColumn = "text",
    context_lengths: Annotated[
        list[int] | None,
        typer.Option("--context_length", min=2, help="of perplexity and generated tasks; may be repeated"),
    ] = None,
    max_eval_tokens: Annotated[
        int | None, typer.Option("--max_eval_tokens", min=1, help="left out: 500 blocks per context length")
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="windows of the context move on by so many tokens")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help=help_text()),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="items per task")] = None,
    include_path: Annotated[str | None, typer.Option("--include_path", help="a folder of tasks for lm-eval")] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="of tasks")] = 8,
    control: Annotated[
        str | None, typer.Option("--control", metavar="MODEL", help="compare with this model on the same items")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Perplexity and tasks of a model, swapped or not, with standard errors; differences to a control are paired.

    A task may ask the control too: with `--tasks writing` both write on from the text, and how long they agree is said.
    Masked models have accuracy and pseudo-perplexity of masked tokens in place of perplexity; classifiers and encoders
    the agreement and the cosine with the control.

    Example: attnswap evaluate relu16 --control HuggingFaceTB/SmolLM2-135M --validation_file book.txt --tasks needle
    """
    from ..evaluation.tasks import check_tasks

    names = [name for name in (tasks or "").split(",") if name]
    given = validation_file is not None or dataset_name is not None
    check_tasks(names, given)
    source = None
    if given or not names:
        source = text_source(validation_file, dataset_name, dataset_config_name, split, text_column)
    contexts = context_lengths or [512]
    if stride and stride >= min(contexts):
        raise UsageError(f"stride is {stride}; expected less than the context of {min(contexts)}")
    told = {
        "source": source, "contexts": contexts, "max_eval_tokens": max_eval_tokens, "stride": stride, "names": names,
        "limit": limit, "include_path": include_path, "batch_size": batch_size, "seed": seed,
        "loading": {
            "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle,
        },
    }  # fmt: skip
    with status("loading the model") as say:
        against = _measure(control, None, say, is_control=True, **told) if control else None
        ours = _measure(model, against, say, is_control=False, **told)
    content, tables = _result(ours, against)
    show(as_json, content, *tables)


def _measure(
    name, against, progress, *, is_control, source, contexts, max_eval_tokens, stride, names, limit, include_path,
    batch_size, seed, loading,
) -> dict:  # fmt: skip
    """Return all that is measured of one model; `against` is what this function returned for the control."""
    from ..evaluation.perplexity import count_units, perplexity, sliding_perplexity
    from ..evaluation.tasks import TaskInputs, answers_of, check_tasks, quality_task, run_tasks, separate_texts
    from ..integration.objectives import objective, require_positions
    from ..integration.swapping import describe
    from ..sources.blocks import cut, start_tokens
    from ..sources.models import load
    from ..sources.texts import token_stream

    model, tokenizer = load(name, **loading)
    task = quality_task(model)
    names = names or ([] if task is None else [task])
    check_tasks(names, source is not None, objective(model))
    require_positions(model, max(contexts), "--context_length")
    if task and stride:
        raise UsageError(f"--stride is for perplexity, which {type(model).__name__} has not: leave it out")
    found: dict[str, Any] = {"model": name, "attention": describe(model), "perplexity": []}
    found["trained"] = getattr(model.config, "max_position_embeddings", None)
    texts: list[str] = []
    if source:
        most, start = max(max_eval_tokens or FEW * (stride or max(contexts)), *contexts), start_tokens(tokenizer)
        tokens = token_stream(source, tokenizer, most)
        if not (separate_texts(names) or len(cut(tokens, max(contexts), start))):
            raise UsageError(
                f"text {source.name!r} gives {len(tokens)} tokens, less than one block of {max(contexts)}: "
                "give more text or a shorter context"
            )
        found["tokens"] = [*start, *tokens.tolist()]
        if against and against["tokens"] != found["tokens"]:
            raise UsageError(f"{name!r} and {against['model']!r} have different tokenizers, so nothing can be paired")
        texts = list(islice(source.rows(), separate_texts(names, limit)))
        for context in contexts if task is None else []:
            progress(f"{name}: perplexity at context {context}")
            if stride:
                measured = sliding_perplexity(model, tokens, context, stride, start=start)
            else:
                blocks = max(max_eval_tokens, *contexts) // context if max_eval_tokens else FEW
                measured = perplexity(model, tokens, context, blocks, start=start)
            units = count_units(tokenizer, tokens, context, len(measured.nll), stride, start)
            found["perplexity"].append((measured, units))
    inputs = TaskInputs(contexts, limit, batch_size, seed, tokens if source else None, texts)
    answers = against and against["answers"]
    if is_control:
        progress(f"{name}: answers to the tasks")
        answers = found["answers"] = answers_of(model, tokenizer, names, inputs)
    found["results"] = run_tasks(
        model, tokenizer, names, inputs, answers=answers, include_path=include_path, progress=progress
    )
    return found


def _result(ours: dict, against: dict | None) -> tuple[dict[str, Any], list]:
    from ..evaluation.perplexity import ratio

    rows = []
    for index, (measured, units) in enumerate(ours["perplexity"]):
        row = _perplexity_row(measured, units, ours["trained"])
        if against:
            row["ratio"] = ratio(measured, against["perplexity"][index][0])
            row["verdict"] = row["ratio"]["verdict"]
        rows.append(row)
    compared = {"ratio_to_control": "ratio", "verdict": "verdict"} if against else {}
    title = f"{ours['model']}: {ours['attention']}"
    title += f", beside {against['model']}: {against['attention']}" if against else ""
    tables = []
    if rows:
        tables.append(table_of(title, rows, **PERPLEXITY, **compared, note="note"))
        positions = [p | {"context": row["context"]} for row in rows for p in row["by_position"]]
        columns = {"context": "context", "positions_from": "first", "to": "last", "perplexity": "perplexity"}
        tables += [table_of("by position in the context", positions, **columns)] if positions else []
    controls = against["results"] if against else [None] * len(ours["results"])
    tasks = [result.row(other) for result, other in zip(ours["results"], controls, strict=True)]
    if tasks:
        compared = {"control": "control", "difference": "difference", "verdict": "verdict"} if against else {}
        tables.append(table_of(title, tasks, **TASKS, **compared))
    compared_rows = [row.get("difference") or row.get("ratio") for row in (*rows, *tasks)]
    if any(compared and compared["low"] is None for compared in compared_rows):
        tables.append(f"no interval: it needs {MIN_ITEMS} blocks or items of a task")
    if any(row.get("few") or (row.get("ratio") or {}).get("few") for row in (*rows, *tasks)):
        tables.append("* or few items: fewer than 500, so the interval is rough")
    content = {"model": ours["model"], "attention": ours["attention"], "control": against and against["model"]}
    return content | {"perplexity": rows, "tasks": tasks}, tables


def _perplexity_row(found, units, trained: int | None) -> dict[str, Any]:
    error = found.standard_error
    return {
        "context": found.context,
        "stride": found.stride,
        "perplexity": found.perplexity,
        "nll": found.mean,
        "standard_error": None if math.isnan(error) else error,
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
