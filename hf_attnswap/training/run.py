"""A run of a training script: the model and the text that it is asked for, the steps, the saved model."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from launch import say, unit_bar
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from validation import log_validation

from hf_attnswap import UsageError, restore, swap
from hf_attnswap.integration.swapping import describe, swapped_modules
from hf_attnswap.sources.files import whole_folder
from hf_attnswap.sources.models import load
from hf_attnswap.sources.texts import TextSource, token_blocks
from hf_attnswap.sources.tokens import default_folder
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


def load_as_asked(args: argparse.Namespace, accelerator: Accelerator) -> tuple[PreTrainedModel, Any]:
    """The model to train, swapped if `--attention` says so, and its tokenizer."""
    model, tokenizer = load(args.model_name_or_path, dtype=args.dtype, device=accelerator.device)
    if args.attention:
        swap_as_asked(model, args, accelerator, args.attention)
    elif args.layers or args.option:
        raise UsageError("--layers and --option belong to --attention, which is missing")
    return model, tokenizer


def swap_as_asked(
    model: PreTrainedModel, args: argparse.Namespace, accelerator: Accelerator, attention: str | None
) -> None:
    """Swap the model to `attention`, with the layers and options of the arguments.

    A conversion to `softmax`, the control that was trained, computes what the original did, and is swapped like one.
    """
    if {attention.name for attention in swapped_modules(model).values()} == {"softmax"}:
        say(accelerator, f"{args.model_name_or_path} has {describe(model)}, which gives way to {attention}")
        restore(model)
    layers = args.layers if args.layers is None or ":" in args.layers else args.layers.split(",")
    swap(model, attention, layers=layers, **parse_options(args.option or []))


def freeze_as_asked(model: PreTrainedModel, args: argparse.Namespace) -> None:
    if args.freeze_embeddings:
        for embeddings in _embeddings(model):
            embeddings.requires_grad_(False)


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Of the input, and of the output where the model has those."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [embeddings for embeddings in both if embeddings is not None]


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
    embeddings = {id(p) for part in _embeddings(model) for p in part.parameters()}
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
