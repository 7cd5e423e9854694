"""What the example scripts share: arguments, the accelerator and the check of its processes, the run, the saving."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    LoggerType,
    gather_object,
    parse_flag_from_env,
    set_seed,
)
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from hf_attnswap import UsageError, swap
from hf_attnswap.data import TextSource, token_blocks
from hf_attnswap.evaluation.perplexity import Perplexity, perplexity
from hf_attnswap.files import require_empty, whole_folder, write_whole
from hf_attnswap.loading import load
from hf_attnswap.token_cache import default_folder
from hf_attnswap.tradeoff import parse_options
from hf_attnswap.training.batches import Batches, batches, require_separate
from hf_attnswap.training.checkpoints import find_checkpoint
from hf_attnswap.training.loop import Step, train

# Arguments that a resumed run must share with the one that it continues, beside those that `train` compares itself.
IDENTITY = (
    "model_name_or_path dtype attention layers option train linear_branch_alone weights_loss use_lora lora_r "
    "lora_alpha lora_dropout freeze_embeddings align_steps align_learning_rate teacher_name_or_path temperature "
    "hidden_weight".split()
)

# So much of a text is shuffled at least, however short the run: its beginning alone may be a single subject.
SHUFFLED_TOKENS = 1_000_000

OUTPUT = """\
output_dir:
  model/               the finished model with its tokenizer; it appears whole, at the end
  checkpoints/step_N/  the newest checkpoint, for --resume_from_checkpoint; can be removed once model/ is there
  training_log.jsonl   one line per step
  validation_log.jsonl one line per --validation_steps, where --validation_file is given
"""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name_or_path", required=True, help="a Hub id, a folder or a .gguf file")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: %(default)s)")


def add_text_arguments(parser: argparse.ArgumentParser, file_option: str) -> None:
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument(file_option, help="text, json, jsonl, parquet, csv or tsv")
    text.add_argument("--dataset_name", help="a dataset of the Hub")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--text_column", default="text", help="column that holds the text (default: %(default)s)")


def training_parser(description: str, learning_rate: float) -> argparse.ArgumentParser:
    """The arguments of a script that trains on blocks of text."""
    parser = argparse.ArgumentParser(
        description=description, epilog=OUTPUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_text_arguments(parser, "--train_file")
    parser.add_argument("--block_size", type=positive, default=512, help="tokens per block (default: %(default)s)")
    parser.add_argument(
        "--separate_documents",
        action="store_true",
        help="rows of the source (paragraphs of a .txt) share blocks, but neither attention nor loss reaches across",
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--max_train_steps", type=positive, help="optimiser steps")
    length.add_argument("--max_train_tokens", type=positive, help="over all processes; whole steps of them")
    add_training_arguments(parser, learning_rate)
    return parser


def add_training_arguments(parser: argparse.ArgumentParser, learning_rate: float, batch_size: int = 1) -> None:
    """The arguments of every training script."""
    add_model_arguments(parser)
    parser.add_argument("--attention", help="swap to this variant first, see `attnswap ls`")
    parser.add_argument("--layers", help="which layers to swap: a slice '1::2' or indices '0,3,5' (default: all)")
    parser.add_argument("--option", action="append", metavar="NAME=VALUE", help="of the variant; may be repeated")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new or empty folder, see below")
    parser.add_argument(
        "--per_device_train_batch_size", type=positive, default=batch_size, help="(default: %(default)s)"
    )
    parser.add_argument("--gradient_accumulation_steps", type=positive, default=1)
    parser.add_argument("--learning_rate", type=float, default=learning_rate, help="(default: %(default)s)")
    parser.add_argument(
        "--new_parameters_learning_rate",
        type=float,
        help="of the swapped attention's own parameters (default: that of the others)",
    )
    parser.add_argument(
        "--final_learning_rate", type=float, default=0.0, help="a cosine ends there (default: %(default)s)"
    )
    parser.add_argument("--num_warmup_steps", type=int, default=0, help="before the cosine (default: %(default)s)")
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--checkpointing_steps", type=positive, help="a checkpoint every so many steps (default: none)")
    parser.add_argument(
        "--resume_from_checkpoint",
        metavar="FOLDER",
        help="a checkpoint, or 'latest' for that of output_dir, which starts anew where there is none",
    )
    parser.add_argument("--with_tracking", action="store_true")
    parser.add_argument("--report_to", default="all", choices=LoggerType.list(), help="(default: all installed)")
    parser.add_argument("--seed", type=int, default=0, help="of new weights, dropout and the order of the text")


def add_whole_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the scripts that train the model's own output."""
    parser.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="compute layers again in the backward pass: less memory, about a third more time",
    )
    parser.add_argument(
        "--freeze_embeddings",
        action="store_true",
        help="of a model that trains in full, leave the input and output embeddings as they are: where these are tied, "
        "they hold the space in which the original's logits arise",
    )
    parser.add_argument("--validation_file", help="log the perplexity on it, read as the training file is")
    parser.add_argument("--validation_steps", type=positive, default=100, help="(default: %(default)s)")
    parser.add_argument("--max_validation_tokens", type=positive, default=8192, help="(default: %(default)s)")


def freeze_as_asked(model: PreTrainedModel, args: argparse.Namespace) -> None:
    if args.freeze_embeddings:
        for embeddings in _embeddings(model):
            embeddings.requires_grad_(False)


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Of the input, and of the output where the model has those."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [embeddings for embeddings in both if embeddings is not None]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def build_accelerator(gradient_accumulation_steps: int = 1, **arguments: Any) -> Accelerator:
    """An Accelerator, on the CPU where there is no other device.

    Raises:
        UsageError: it does not run as the launcher was asked to. Processes that do not know of each other would each
            train alone, and write over one another.
    """
    # The plugin, because Accelerator(gradient_accumulation_steps=) fails on the "auto" of a DeepSpeed config.
    plugin = GradientAccumulationPlugin(num_steps=gradient_accumulation_steps, sync_with_dataloader=False)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), gradient_accumulation_plugin=plugin, **arguments
    )
    environment, processes = os.environ, accelerator.num_processes
    asked = environment.get("WORLD_SIZE", "1")
    if "WORLD_SIZE" not in environment and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environment.keys():
        # What `accelerate launch` leaves behind when it starts one process in place of several (accelerate#2741).
        asked = "several"
    if asked != str(processes):
        raise UsageError(
            f"the launcher was asked for {asked} processes, and this runs as {processes}: to run several on the CPU, "
            "use accelerate launch --config_file examples/configs/multi_cpu.yaml, or torchrun"
        )
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        wanted = parse_flag_from_env(f"ACCELERATE_USE_{kind.value}")
        if wanted and accelerator.distributed_type != kind:
            raise UsageError(
                f"the launcher was asked for {kind.value}, and this runs as {accelerator.distributed_type.value}"
            )
    if not accelerator.is_main_process:
        disable_progress_bar()
    return accelerator


def start(args: argparse.Namespace) -> Accelerator:
    """The accelerator of a training script, after its output folder and its trackers are found to be fit."""
    accelerator = build_accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to if args.with_tracking else None,
        project_dir=args.output_dir,
    )
    require_empty(args.output_dir / "model" if args.resume_from_checkpoint else args.output_dir)
    accelerator.wait_for_everyone()  # before one process writes into the folder that another finds empty
    if args.with_tracking and not accelerator.log_with:
        raise UsageError(f"report_to is {args.report_to!r}, but no such tracker is installed")
    set_seed(args.seed)
    return accelerator


def run_script(
    parser: argparse.ArgumentParser,
    stage: Callable[[argparse.Namespace, Accelerator], Any],
    argv: Sequence[str] | None = None,
) -> Any:
    """Parse the arguments, run the stage on the accelerator that they ask for, and end the processes' group."""
    args = parser.parse_args(argv)
    accelerator = start(args)
    found = stage(args, accelerator)
    accelerator.end_training()
    return found


def load_as_asked(args: argparse.Namespace, accelerator: Accelerator) -> tuple[PreTrainedModel, Any]:
    """The model to train, swapped if `--attention` says so, and its tokenizer."""
    model, tokenizer = load(args.model_name_or_path, dtype=args.dtype, device=accelerator.device)
    if args.attention:
        swap_as_asked(model, args, args.attention)
    elif args.layers or args.option:
        raise UsageError("--layers and --option belong to --attention, which is missing")
    return model, tokenizer


def swap_as_asked(model: PreTrainedModel, args: argparse.Namespace, attention: str | None) -> None:
    """Swap the model to `attention`, with the layers and options of the arguments."""
    layers = args.layers if args.layers is None or ":" in args.layers else args.layers.split(",")
    swap(model, attention, layers=layers, **parse_options(args.option or []))


def count_steps(args: argparse.Namespace, accelerator: Accelerator) -> tuple[int, int]:
    """How many optimiser steps, and of how many tokens each."""
    tokens = args.per_device_train_batch_size * accelerator.gradient_accumulation_steps * accelerator.num_processes
    tokens *= args.block_size
    return args.max_train_steps or max(1, args.max_train_tokens // tokens), tokens


def read_text(args: argparse.Namespace, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The blocks to train on, `[N, block_size, ...]`: as many as the steps take, and of short runs those that they are
    drawn from. Their tokens are cached."""
    steps, tokens = count_steps(args, accelerator)
    source = TextSource(
        args.train_file or args.dataset_name, config_name=args.dataset_config_name, column=args.text_column
    )
    with accelerator.local_main_process_first():  # the others find its tokens in the cache
        return token_blocks(
            source,
            tokenizer,
            args.block_size,
            max_tokens=max(steps * tokens, SHUFFLED_TOKENS),
            separate=args.separate_documents,
            cache_dir=default_folder(),
        )


def read_validation(
    args: argparse.Namespace, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase
) -> Tensor | None:
    """The blocks to validate on, `[N, block_size]`; None where there is no such text."""
    if args.validation_file is None:
        return None
    source = TextSource(args.validation_file, column=args.text_column)
    with accelerator.local_main_process_first():
        return token_blocks(
            source, tokenizer, args.block_size, max_tokens=args.max_validation_tokens, cache_dir=default_folder()
        )


def run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: nn.Module,
    blocks: Tensor,
    step_loss: Step,
    validation: Tensor | None = None,
) -> list[float]:
    """Train on blocks of text what requires a gradient, with a progress bar; the loss of each step.

    Args:
        validation: blocks `[N, block_size]` on which the perplexity is logged, every `--validation_steps`.
    """
    steps, tokens = count_steps(args, accelerator)
    say(accelerator, f"a text of {len(blocks) * args.block_size:,} tokens")
    if args.separate_documents:
        require_separate(model)
    loader = batches(blocks, args.per_device_train_batch_size, args.seed)
    validate = None
    if validation is not None:
        log = args.output_dir / "validation_log.jsonl"

        def validate(step: int) -> None:
            if step % args.validation_steps == 0 or step == steps:
                log_validation(accelerator, model, validation, log, step, step * tokens)

    return run_steps(args, accelerator, model, loader, step_loss, steps=steps, step_size=tokens, validate=validate)


def log_validation(
    accelerator: Accelerator, model: nn.Module, blocks: Tensor, log: Path, step: int, tokens: int
) -> None:
    """Add the perplexity after `step` to the log; what a run cut off had logged from there on goes."""
    found = shared_perplexity(accelerator, model, blocks.long())
    if not accelerator.is_main_process:
        return
    lines = log.read_text().splitlines() if log.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    entry = {"step": step, "tokens": tokens, "perplexity": found.perplexity, "nll": found.mean}
    if not math.isnan(found.standard_error):
        entry["standard_error"] = found.standard_error
    log.parent.mkdir(parents=True, exist_ok=True)
    write_whole(log, "".join(f"{line}\n" for line in [*kept, json.dumps(entry)]).encode())
    accelerator.log({"validation_perplexity": found.perplexity}, step=step)
    say(accelerator, f"step {step}: perplexity {found.perplexity:.3f} on the validation text")


def shared_perplexity(
    accelerator: Accelerator, model: nn.Module, blocks: Tensor, progress: Callable[[int], None] | None = None
) -> Perplexity:
    """Of blocks `[N, n]`: this process takes every so many-th, and all of them gather what they found. All take equally
    many, some of them twice, because under FSDP each forward pass is one of all processes."""
    own, context = own_blocks(accelerator, len(blocks)), blocks.shape[1]
    nll = perplexity(model, blocks[own], context, progress=progress).nll
    by_block = dict(gather_object(list(zip(own, nll, strict=True))))
    return Perplexity(context, tuple(by_block[block] for block in range(len(blocks))))


def own_blocks(accelerator: Accelerator, count: int) -> list[int]:
    """Which of `count` blocks this process measures."""
    rounds = range(0, count, accelerator.num_processes)
    return [(first + accelerator.process_index) % count for first in rounds]


def run_steps(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: nn.Module,
    loader: Batches,
    step_loss: Step,
    *,
    steps: int,
    step_size: int,
    unit: str = "tokens",
    learning_rate: float | None = None,
    output_dir: Path | None = None,
    validate: Callable[[int], None] | None = None,
) -> list[float]:
    """What `run` does, on any batches, with steps of so many units.

    Args:
        learning_rate, output_dir: in place of those of the arguments.
        validate: called before the first step, with 0, and after each.
    """
    output_dir = output_dir or args.output_dir
    parameters = [p for p in model.parameters() if p.requires_grad]
    say(accelerator, what_trains(model))
    for dtype in {p.dtype for p in parameters} & {torch.bfloat16, torch.float16}:
        say(
            accelerator,
            f"the weights that train are {str(dtype).removeprefix('torch.')}, which loses updates below a few "
            "thousandths of a weight: leave --dtype at float32, and pass --mixed_precision bf16 to accelerate launch "
            "to compute in bfloat16",
        )
    checkpoint = args.resume_from_checkpoint and find_checkpoint(args.resume_from_checkpoint, output_dir)
    if args.resume_from_checkpoint:
        say(accelerator, f"going on from {checkpoint}" if checkpoint else "no checkpoint yet: starting anew")
    if args.with_tracking:
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in vars(args).items()}
        accelerator.init_trackers("hf_attnswap", config=plain)
    if validate is not None and not checkpoint:
        validate(0)
    with progress_bar(accelerator, steps, step_size, unit) as draw:

        def progress(step: int, loss: float) -> None:
            draw(step, loss)
            if validate is not None:
                validate(step)

        return train(
            accelerator,
            model,
            loader,
            step_loss,
            learning_rate=args.learning_rate if learning_rate is None else learning_rate,
            steps=steps,
            new_parameters_learning_rate=args.new_parameters_learning_rate if learning_rate is None else None,
            final_learning_rate=args.final_learning_rate if learning_rate is None else 0.0,
            warmup=args.num_warmup_steps,
            weight_decay=args.weight_decay,
            output_dir=output_dir,
            checkpointing_steps=args.checkpointing_steps,
            resume_from_checkpoint=checkpoint,
            settings={
                "mixed_precision": accelerator.mixed_precision,
                **{name: getattr(args, name) for name in IDENTITY if hasattr(args, name)},
            },
            unit=unit,
            progress=progress,
        )


def what_trains(model: nn.Module) -> str:
    """How many parameters of which kind train, of how many."""
    embeddings = {
        id(p)
        for part in (model.get_input_embeddings(), model.get_output_embeddings())
        if part
        for p in part.parameters()
    }
    counts = dict.fromkeys(("the swapped attention", "LoRA", "the embeddings", "other weights"), 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if ".attnswap." in name:
                kind = "the swapped attention"
            elif ".lora_" in name:
                kind = "LoRA"
            else:
                kind = "the embeddings" if id(parameter) in embeddings else "other weights"
            counts[kind] += parameter.numel()
    total = sum(p.numel() for p in model.parameters())
    parts = ", ".join(f"{count:,} of {kind}" for kind, count in counts.items() if count)
    return f"{sum(counts.values()):,} of {total:,} parameters train: {parts}"


def save(
    args: argparse.Namespace, accelerator: Accelerator, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """The model and its tokenizer in `output_dir/model`, which appears whole; ends what trackers record."""
    folder = args.output_dir / "model"
    state = accelerator.get_state_dict(model)  # of all processes together
    if accelerator.is_main_process:
        with whole_folder(folder) as temporary:
            model.save_pretrained(temporary, state_dict=state)
            tokenizer.save_pretrained(temporary)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    return folder


@contextmanager
def progress_bar(
    accelerator: Accelerator, steps: int, step_size: int, unit: str
) -> Iterator[Callable[[int, float], None]]:
    """A bar of `steps` steps of `step_size` units each, on the main process; what it yields goes to `train`."""
    bar = None

    def progress(step: int, loss: float) -> None:
        nonlocal bar
        if bar is None:  # not before: a resumed run begins in the middle
            bar = unit_bar(accelerator, steps * step_size, initial=(step - 1) * step_size, unit=unit)
        bar.set_postfix(step=f"{step}/{steps}", loss=f"{loss:.4f}", refresh=False)
        bar.update(step_size)
        accelerator.log({"loss": loss, unit: step * step_size}, step=step)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def unit_bar(accelerator: Accelerator, total: int, initial: int = 0, unit: str = "tokens") -> tqdm:
    """Units done, units per second and time left; seldom redrawn where stderr is a file."""
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,
        disable=not accelerator.is_main_process,
    )


def say(accelerator: Accelerator, line: str) -> None:
    if accelerator.is_main_process:
        print(line, file=sys.stderr, flush=True)
