"""Run a training: load the text that its options ask for, swap the model, run the steps, and save the model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..config import SwapConfig, layers_of, parse_options, places_of
from ..errors import UsageError
from ..integration.swapping import describe, restore, swap, swapped_modules
from ..launch import build_accelerator, say, unit_bar
from ..sources.checksums import CHECKSUMS, checksums
from ..sources.files import require_empty, whole_folder, write_whole
from ..sources.lock import alone_in
from ..sources.plans import read_plan
from ..sources.texts import TextSource, token_blocks
from ..sources.tokens import default_folder
from .batches import Batches
from .checkpoints import find_checkpoint
from .loop import Step, train
from .options import TextOptions, TrainingOptions, identity

# So much of a text is shuffled at least, however short the run: its beginning alone may be a single subject.
SHUFFLED_TOKENS = 1_000_000


@contextmanager
def start(options: TrainingOptions) -> Iterator[Accelerator]:
    """Yield the accelerator of a run, after checking its output folder, which no other process enters meanwhile.

    Raises:
        UsageError: the output folder is not empty (of a resumed run: holds a model already), or another process is in
            it, or no tracker of `report_to` is installed; or as `build_accelerator` does.
    """
    accelerator = build_accelerator(
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=options.report_to if options.with_tracking else None,
        project_dir=options.output_dir,
    )
    with alone_in(options.output_dir) if accelerator.is_main_process else nullcontext():
        require_empty(options.output_dir / "model" if options.resume_from_checkpoint else options.output_dir)
        accelerator.wait_for_everyone()  # before one process writes into the folder that another finds empty
        if options.with_tracking and not accelerator.log_with:
            raise UsageError(f"report_to is {options.report_to!r}, but no such tracker is installed")
        set_seed(options.seed)
        yield accelerator


def swap_as_asked(
    model: PreTrainedModel, options: TrainingOptions, accelerator: Accelerator, default: str | None = None
) -> bool:
    """Swap the model in place as `options` say, or to `default` in all layers where they name none.

    A conversion to `softmax`, the control that was trained, computes what the original did, so its softmax is replaced.

    Returns:
        Whether the model was swapped: not where the options name nothing and there is no default.

    Raises:
        UsageError: an unknown variant, layer, group or option, options that do not fit each other, or a model that is
            swapped to another variant already.
    """
    config = plan_of(options, default)
    if config is None:
        return False
    if options.plan:
        read_plan(options.plan).require(model)
    if {variant.name for variant in swapped_modules(model).values()} == {"softmax"}:
        say(accelerator, f"{options.model_name_or_path} has {describe(model)}, which gives way to {config.attention}")
        restore(model)
    swap(model, config)
    return True


def plan_of(options: TrainingOptions, default: str | None = None) -> SwapConfig | None:
    """Return what `options` say of the swap; None where they name nothing and there is no default.

    Raises:
        UsageError: layers, groups or options without an attention.
    """
    if options.attention is None and default is None:
        others = {"--layers": options.layers, "--keep": options.keep, "--option": options.option}
        given = [name for name, value in others.items() if value]
        if given:
            raise UsageError(f"{' and '.join(given)} belong to --attention, which is missing")
        return None
    return SwapConfig(
        default if options.attention is None else options.attention,
        layers_of(options.layers),
        parse_options(options.option or []),
        keep=places_of(options.keep),
    )


def embeddings_of(model: nn.Module) -> list[nn.Module]:
    """Return the embeddings of the input, and those of the output where the model has them."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [embeddings for embeddings in both if embeddings is not None]


def count_steps(options: TextOptions, accelerator: Accelerator) -> tuple[int, int]:
    """Return the number of optimiser steps, and the tokens of each step over all processes."""
    tokens = options.per_device_train_batch_size * accelerator.gradient_accumulation_steps * accelerator.num_processes
    tokens *= options.block_size
    return options.max_train_steps or max(1, options.max_train_tokens // tokens), tokens


def read_text(
    options: TextOptions, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, closed: bool = False
) -> Tensor:
    """Return the blocks to train on, `[N, block_size]`, or `[N, block_size, 2]` with separate documents.

    The function reads as many tokens as the steps take, but at least `SHUFFLED_TOKENS`, from which a short run draws
    its blocks; a shorter text is read whole. Tokens are cached. `closed` is that of `token_blocks`.
    """
    steps, tokens = count_steps(options, accelerator)
    source = TextSource(
        options.train_file or options.dataset_name, config_name=options.dataset_config_name, column=options.text_column
    )
    with accelerator.local_main_process_first():  # the others find its tokens in the cache
        return token_blocks(
            source,
            tokenizer,
            options.block_size,
            max_tokens=max(steps * tokens, SHUFFLED_TOKENS),
            separate=options.separate_documents,
            closed=closed,
            cache_dir=default_folder(),
        )


def run_steps(
    options: TrainingOptions,
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
    """Train what requires a gradient, with a progress bar, and return the loss of each step.

    Args:
        loader: the batches of token blocks.
        step_loss: `(model, batch) -> loss` of one batch.
        steps: number of optimiser steps.
        step_size: units per step.
        unit: what the units are called.
        learning_rate: highest learning rate of all parameters, with a cosine to 0; None for the learning rates of the
            options.
        output_dir: where checkpoints and log go; None for the `output_dir` of the options.
        validate: called with 0 before the first step of a new run, and with the number of each step after that step.

    Raises:
        UsageError, FloatingPointError, OSError: as `train` does.
    """
    output_dir = output_dir or options.output_dir
    say(accelerator, what_trains(model))
    for dtype in {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}:
        say(
            accelerator,
            f"the weights that train are {str(dtype).removeprefix('torch.')}, which loses updates below a few "
            "thousandths of a weight: leave --dtype at float32, and pass --mixed_precision bf16 to accelerate launch "
            "to compute in bfloat16",
        )
    checkpoint = options.resume_from_checkpoint and find_checkpoint(options.resume_from_checkpoint, output_dir)
    if options.resume_from_checkpoint:
        say(accelerator, f"going on from {checkpoint.folder}" if checkpoint else "no checkpoint yet: starting anew")
    if options.with_tracking:
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in asdict(options).items()}
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
            learning_rate=options.learning_rate if learning_rate is None else learning_rate,
            steps=steps,
            new_parameters_learning_rate=options.new_parameters_learning_rate if learning_rate is None else None,
            final_learning_rate=options.final_learning_rate if learning_rate is None else 0.0,
            warmup=options.num_warmup_steps,
            weight_decay=options.weight_decay,
            output_dir=output_dir,
            checkpointing_steps=options.checkpointing_steps,
            resume_from_checkpoint=checkpoint,
            settings={"mixed_precision": accelerator.mixed_precision, **identity(options)},
            unit=unit,
            progress=progress,
        )


def what_trains(model: nn.Module) -> str:
    """Return in words how many parameters of which kind train, and how many the model has."""
    embeddings = {id(p) for part in embeddings_of(model) for p in part.parameters()}
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
    options: TrainingOptions,
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
) -> Path:
    """Write the model and its tokenizer to `output_dir/model`, which appears whole, and close the trackers.

    The checksums of its files lie beside the folder.
    """
    folder = options.output_dir / "model"
    state = accelerator.get_state_dict(model)  # of all processes together
    for name, source in model.all_tied_weights_keys.items():  # what FSDP2 gathers is tied no more
        if name in state and model.get_parameter_or_buffer(name) is model.get_parameter_or_buffer(source):
            del state[name]
    if accelerator.is_main_process:
        with whole_folder(folder) as temporary:
            model.save_pretrained(temporary, state_dict=state)
            tokenizer.save_pretrained(temporary)
            write_whole(options.output_dir / CHECKSUMS, json.dumps(checksums(temporary), indent=1).encode())
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    return folder


@contextmanager
def progress_bar(
    accelerator: Accelerator, steps: int, step_size: int, unit: str
) -> Iterator[Callable[[int, float], None]]:
    """Draw a progress bar on the main process, while the context is open.

    Yields the function that `train` calls with each step and its loss.

    Args:
        steps: number of steps.
        step_size: units per step.
        unit: what the units are called.
    """
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
