"""The `attnswap` command: thin wrappers that print, and one clear line where something is wrong."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import UsageError, one_line_errors

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Replace the softmax attention of pretrained transformers models, and measure what it costs.",
)

# typer may bring a click of its own, so the base of its errors is found from one that it names.
_ClickException = typer.BadParameter.__base__.__base__

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a Hub id, a folder, or a .gguf file")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; CUDA where there is one")]
Revision = Annotated[str | None, typer.Option("--revision", help="of a Hub model")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust_remote_code", help="run code that the model's repository brings")
]
AllowPickle = Annotated[bool, typer.Option("--allow_pickle", help="read pickled weights where it has no safetensors")]
AttentionName = Annotated[str, typer.Option("--attention", help="a variant, see `attnswap ls`")]
Layers = Annotated[str | None, typer.Option("--layers", help="all, or a slice '1::2', or indices '0,3,5'")]
Kinds = Annotated[
    list[str] | None, typer.Option("--kind", help="causal, bidirectional or cross; may be repeated; the first two")
]
Options = Annotated[list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="an option of the variant")]
Seed = Annotated[int, typer.Option("--seed", help="of the order of text")]
TrainFile = Annotated[str | None, typer.Option("--train_file", help="text, json, parquet or csv")]
ValidationFile = Annotated[
    str | None, typer.Option("--validation_file", help="held-out text; else a fifth is held out")
]
DatasetName = Annotated[str | None, typer.Option("--dataset_name", help="a dataset of the Hub, in place of files")]
DatasetConfig = Annotated[str | None, typer.Option("--dataset_config_name", help="its configuration")]
TextColumn = Annotated[str, typer.Option("--text_column", help="the column that holds the text")]


def main() -> None:
    """Run the command line and exit: 0 on success, 2 on wrong use, 1 on failure, 130 when interrupted."""
    with one_line_errors("attnswap"):
        try:
            code = app(standalone_mode=False, prog_name="attnswap")
        except _ClickException as error:
            if len(sys.argv) < 2:
                error.show()  # the help
                sys.exit(2)
            raise UsageError(error.format_message()) from error
        if code == 130:  # typer has taken the interrupt
            raise KeyboardInterrupt
    sys.exit(code)


def _out(as_json: bool, content: Any, *renderables: Any) -> None:
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        Console().print(*renderables)


def _layers(text: str | None) -> Any:
    return text if text is None or ":" in text else [part.strip() for part in text.split(",")]


@app.command("ls")
def list_attentions(as_json: Json = False) -> None:
    """The variants: what each computes, costs, takes, refuses and learns.

    Example: attnswap ls
    """
    from . import available

    entries = [_description(cls) for cls in available()]
    table = Table(
        title="Attention variants (control: for comparison)",
        caption="Attention: all means causal, bidirectional and cross. Masks: any includes a bias, a soft cap and "
        "sinks; padding, packed refuses all others. State: kept between generated tokens; constant does not grow. "
        "None takes attention dropout.",
    )
    for column in ("name", "computes", "cost", "attention", "masks", "state", "learns", "options", "source"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for e in entries:
        cells = (
            e["name"] + ("\n(control)" if e["control"] else ""),
            e["formula"],
            e["cost"],
            "all" if len(e["kinds"]) == 3 else ", ".join(e["kinds"]),
            e["masks"],
            e["state"],
            ", ".join(e["parameters"]),
            ", ".join(f"{n}={o['default']}" for n, o in e["options"].items()),
            e["source"],
        )
        table.add_row(*map(escape, cells))
    _out(as_json, entries, table)


def _description(cls: type) -> dict[str, Any]:
    from .attentions import Heads

    return {
        "name": cls.name,
        "control": cls.control,
        "formula": cls.formula,
        "cost": cls.cost,
        "cost_class": cls.cost_class,
        "kinds": list(cls.kinds),
        "masks": "any" if cls.any_mask else "padding, packed",
        "state": "constant" if cls.stateful else "keys, values",
        "parameters": [name for name, _ in cls(Heads(1, 1, 1)).named_parameters()],
        "options": {n: {"default": o.default, "help": o.help} for n, o in cls.options().items()},
        "source": cls.source,
    }


@app.command("inspect")
def inspect_model(model: Model, as_json: Json = False, trust_remote_code: TrustRemoteCode = False) -> None:
    """Which attention modules of a model can be swapped, and why the others cannot. Reads no weights.

    Example: attnswap inspect HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from . import inspect
    from .loading import architecture

    found = inspect(architecture(model, trust_remote_code))
    table = Table(title=model)
    for column in ("module", "class", "part", "kind", "layer", "runs", "can be swapped"):
        table.add_column(column, overflow="fold")
    for m in found:
        can = f"no: {m.reason}" if m.reason else "yes"
        table.add_row(m.name, m.class_name, m.part, m.kind, str(m.layer), m.swapped or "softmax", can)
    _out(
        as_json, [vars(m) for m in found], table if found else f"{model} has no attention module that could be swapped"
    )


@app.command()
def convert(
    model: Model,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="a new or empty folder")],
    attention: AttentionName = "hedgehog+window",
    layers: Layers = None,
    kind: Kinds = None,
    option: Options = None,
    dtype: Dtype = "auto",
    portable: Annotated[
        bool, typer.Option("--portable", help="add a file that loads it without hf_attnswap, under trust_remote_code")
    ] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Swap the attention of a model and save it, untrained. Load it after `import hf_attnswap` as any model.

    Example: attnswap convert HuggingFaceTB/SmolLM2-135M --attention relu_power --option p=16 --output_dir relu16
    """
    from . import SwapConfig
    from .files import require_empty, whole_folder
    from .loading import load_any
    from .patching import describe, swap
    from .tradeoff import parse_options

    require_empty(output_dir)
    loaded, processor = load_any(
        model, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    swap(loaded, attention, layers=_layers(layers), kinds=kind or SwapConfig.kinds, **parse_options(option or []))
    with whole_folder(output_dir) as folder:
        loaded.save_pretrained(folder, portable=portable)
        if processor is not None:
            processor.save_pretrained(folder)
    print(f"{output_dir}: {describe(loaded)}, not trained" + ("" if processor else "; it has no tokenizer"))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a saved conversion")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="the repository, made where there is none")],
    private: Annotated[bool, typer.Option("--private", help="a new repository that only you see")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="a branch, made where there is none")] = None,
    create_pr: Annotated[bool, typer.Option("--create_pr", help="a pull request in place of a commit")] = False,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="list what would go, and stop")] = False,
    base_model: Annotated[
        str | None, typer.Option("--base_model", help="Hub id of the model that was converted, or none")
    ] = None,
    licence: Annotated[str | None, typer.Option("--license", help="where its card does not say it")] = None,
    as_json: Json = False,
) -> None:
    """Push a conversion to the Hub, with a card written from its config.json and report.json. Repeat it to continue.

    Example: attnswap push converted user/smollm2-hedgehog --private --dry_run
    """
    from .publish import push as publish

    operations = publish.prepare(folder, repo_id, base_model=base_model, licence=licence)
    files = {operation.path_in_repo: operation.upload_info.size for operation in operations}
    table = Table(title=f"to {repo_id}" + (f", revision {revision}" if revision else ""))
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    for name, size in files.items():
        table.add_row(escape(name), f"{size:,}")
    if dry_run:
        _out(as_json, {"repo_id": repo_id, "files": files, "url": None}, table)
        return
    url = publish.push(operations, repo_id, private=private or None, revision=revision, create_pr=create_pr)
    _out(as_json, {"repo_id": repo_id, "files": files, "url": url}, table, url)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="such as lm_eval, transformers, accelerate")],
) -> None:
    """Run another Python program with hf_attnswap imported, so that it loads conversions as any other model.

    Example: attnswap run lm_eval --model hf --model_args pretrained=converted --tasks hellaswag
    """
    from importlib.metadata import entry_points

    found = next(iter(entry_points(group="console_scripts", name=program)), None)
    if found is None:
        raise UsageError(f"no installed package has a program {program!r}")
    sys.argv = [program, *context.args]
    sys.exit(found.load()())


@app.command()
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
    dtype: Dtype = "float32",
    device: Device = None,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Perplexity of a model, swapped or not, by context length, with the standard error.

    Example: attnswap evaluate relu16 --validation_file book.txt --context_length 512 --context_length 2048
    """
    from .data import token_blocks
    from .evaluation.perplexity import perplexity
    from .loading import load
    from .patching import describe

    source = _source(validation_file, dataset_name, dataset_config_name, split, text_column)
    contexts = context_lengths or [512]
    loaded, tokenizer = load(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    tokens = token_blocks(source, tokenizer, max(contexts), max(max_eval_tokens, max(contexts)))
    rows = []
    table = Table(title=f"{model}: {describe(loaded)}")
    for column in ("context", "perplexity", "nll per token", "standard error", "tokens"):
        table.add_column(column, justify="right")
    for context in contexts:
        found = perplexity(loaded, tokens, context)
        rows.append(
            {
                "context": context,
                "perplexity": found.perplexity,
                "nll": found.mean,
                "standard_error": found.standard_error,
                "tokens": found.tokens,
            }
        )
        table.add_row(
            str(context),
            f"{found.perplexity:.4g}",
            f"{found.mean:.4f}",
            f"{found.standard_error:.4f}",
            str(found.tokens),
        )
    _out(as_json, rows, table)


@app.command()
def bench(
    model: Model,
    attention: Annotated[list[str] | None, typer.Option("--attention", help="may be repeated; all by default")] = None,
    lengths: Annotated[list[int] | None, typer.Option("--length", min=1, help="may be repeated")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = 5,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1)] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="of the CPU; torch's choice by default")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time and memory of the attention alone, at the head shape of MODEL, beside torch's SDPA. Reads no weights.

    Example: attnswap bench HuggingFaceTB/SmolLM2-135M-Instruct --attention elu --length 8192 --threads 1
    """
    import torch

    from . import available, inspect
    from .attentions import get
    from .benchmark.attention import bench as measure
    from .loading import architecture, find_device, find_dtype
    from .patching import head_shape

    if threads:
        torch.set_num_threads(threads)
    built = architecture(model)
    heads = head_shape(built, inspect(built))
    names = attention or [cls.name for cls in available() if cls.name != "softmax"]
    where, kind = find_device(device), find_dtype(dtype)
    variants = {name: _checked(get, name)(heads).to(where, kind) for name in names}
    rows = measure(
        variants,
        heads,
        lengths or [512, 1024, 2048, 4096],
        batch_size=batch_size,
        rounds=rounds,
        dtype=kind,
        device=where,
    )
    table = Table(
        title=f"times as fast as SDPA, median (lowest to highest of {rounds} rounds)\n{heads}, batch "
        f"{batch_size}, {dtype}, {where}, {torch.get_num_threads()} threads"
    )
    for column in ("attention", "length", "forward", "forward + backward", "peak MiB", "SDPA's peak MiB"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for row in rows:
        table.add_row(
            row.attention,
            str(row.length),
            str(row.forward),
            str(row.forward_backward),
            *("?" if m is None else f"{m:.0f}" for m in (row.peak_memory_mib, row.sdpa_peak_memory_mib)),
        )
    _out(
        as_json,
        [{**vars(r), "forward": vars(r.forward), "forward_backward": vars(r.forward_backward)} for r in rows],
        table,
    )


@app.command()
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
    allow_pickle: AllowPickle = False,
) -> None:
    """What each attention costs in quality and gains in speed on a model: report.json, .md, .html and plots.

    Example: attnswap tradeoff HuggingFaceTB/SmolLM2-135M-Instruct --train_file book.txt --output_dir report
    """
    from . import report
    from .loading import load
    from .tradeoff import DEFAULT_ARMS, DEFAULT_LEARNING_RATE, Arm, Settings, measure

    settings = Settings(
        arms=tuple(arms or DEFAULT_ARMS), context_lengths=tuple(context_lengths or [512]),
        max_eval_tokens=max_eval_tokens, lengths=tuple(lengths or [512, 1536]), rounds=rounds,
        decode_tokens=decode_tokens, align_tokens=align_tokens, block_size=block_size,
        learning_rate=learning_rate or DEFAULT_LEARNING_RATE,
        per_device_train_batch_size=per_device_train_batch_size, seed=seed,
    )  # fmt: skip
    for arm in settings.arms:
        Arm.parse(arm)
    training = _source(train_file, dataset_name, dataset_config_name, "train", text_column)
    evaluation = None if validation_file is None else _source(validation_file, None, None, "train", text_column)
    console = Console(stderr=True)
    with console.status("loading the model") as status:
        loaded, tokenizer = load(
            model,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
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
    _out(as_json, found, report.show(found))
    print("\n".join(str(path) for path in written), file=sys.stderr)


def _checked(call, *arguments):
    try:
        return call(*arguments)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _source(file, dataset_name, dataset_config_name, split, column):
    from .data import TextSource

    if (file is None) == (dataset_name is None):
        raise UsageError("give text: either a file or --dataset_name")
    return TextSource(file or dataset_name, split=split, config_name=dataset_config_name, column=column)
