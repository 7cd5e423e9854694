"""Fine-tune an encoder on labelled texts, swapped or not, and measure its accuracy.

Swapped attention with parameters of its own is aligned first: for `--align_steps` steps, on the same texts, each
swapped layer learns to reproduce the softmax output of its layer. Long texts come more often then, in proportion to
their tokens: an attention that has learned among few keys is poor among many. Then all weights train. There is no
dropout in the attention, with softmax neither. Batches are of texts of about one length, so that little of them is
padding.

    accelerate launch benchmarks/classify.py --model_name_or_path MODEL --attention hedgehog \\
        --train_file train.tsv --validation_file dev.tsv --text_column sentence --output_dir classified
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_attnswap import UsageError
from hf_attnswap.errors import one_line_errors
from hf_attnswap.integration.swapping import describe, swapped_modules
from hf_attnswap.launch import build_accelerator, say, unit_bar
from hf_attnswap.sources.files import write_whole
from hf_attnswap.sources.models import load_classifier
from hf_attnswap.sources.texts import TextSource
from hf_attnswap.training.align import aligning, alignment_loss, calibrate, trainable_parameters
from hf_attnswap.training.batches import Batches
from hf_attnswap.training.checkpoints import find_checkpoint
from hf_attnswap.training.options import TrainingOptions, argument, positive
from hf_attnswap.training.options import parse as parse_options
from hf_attnswap.training.run import run_steps, save, start, swap_as_asked

OUTPUT = """\
output_dir:
  model/               the finished model with its tokenizer; it appears whole, at the end
  evaluation.json      accuracy on the validation file, and which of its texts were right
  alignment/           checkpoints and log of the alignment
  checkpoints/step_N/  the two newest checkpoints, for --resume_from_checkpoint; can be removed once model/ is there
  training_log.jsonl   one line per step
"""
EMPTY = -1  # fills a row behind its text; no token


FILE = "json, jsonl, parquet, csv or tsv, with a column for the text and one for the label"


@dataclass(kw_only=True)
class Classify(TrainingOptions):
    """The options of a run."""

    train_file: str = argument(help=FILE)
    validation_file: str = argument(help=FILE)
    text_column: str = argument("text", "column of the text")
    label_column: str = argument("label", "column of the label")
    max_length: int = argument(128, "tokens of a text; the rest is cut", type=positive)
    max_train_samples: int | None = argument(None, "so many texts, drawn with --seed; all without it", type=positive)
    max_eval_samples: int | None = argument(None, "the first so many texts; all without it", type=positive)
    num_train_epochs: int = argument(1, "times that every text is read", type=positive)
    per_device_train_batch_size: int = argument(32, "texts per batch and process", type=positive)
    per_device_eval_batch_size: int = argument(32, "texts per batch and process", type=positive)
    align_steps: int = argument(
        300, "only for variants with parameters, which --attention puts there; 0 for none", type=int
    )
    align_learning_rate: float = argument(3e-2, "learning rate of the alignment")


def parse(argv: Sequence[str] | None = None) -> Classify:
    words = sys.argv[1:] if argv is None else argv
    return parse_options(Classify, words, prog="classify", description=__doc__, epilog=OUTPUT)


def stage(args: Classify, accelerator: Accelerator) -> dict[str, Any]:
    """Train and measure; what is written to evaluation.json."""
    if not args.attention and (args.layers or args.option):
        raise UsageError("--layers and --option belong to --attention, which is missing")
    train_texts, validation_texts = read_texts(args)
    labels = sorted({label for _, label in train_texts}, key=lambda label: (len(label), label))  # 10 after 2
    if len(labels) < 2:
        raise UsageError(f"{args.train_file!r} has one label only: {labels[0]!r}")
    model, tokenizer = load_classifier(args.model_name_or_path, labels, dtype=args.dtype, device=accelerator.device)
    if args.attention:
        swap_as_asked(model, args, accelerator, args.attention)
    groups = by_length(token_rows(train_texts, labels, tokenizer, args.max_length), args.per_device_train_batch_size)
    validation = token_rows(validation_texts, labels, tokenizer, args.max_length)
    loader = Batches(groups, 1, args.seed)
    alignment = align(args, accelerator, model, loader, tokenizer)
    history = fine_tune(args, accelerator, model, loader, tokenizer)
    correct = evaluate(accelerator, model, validation, tokenizer, args.per_device_eval_batch_size)
    found = {
        "attention": describe(model),
        **accuracy(correct),
        "first_loss": history[0],
        "last_loss": history[-1],
        "alignment": alignment,
        "arguments": identity(args),
        "correct": correct,
    }
    if accelerator.is_main_process:
        write_whole(args.output_dir / "evaluation.json", json.dumps(found).encode())
    folder = save(args, accelerator, model, tokenizer)
    low, high = found["interval_95"]
    accelerator.print(
        f"{folder}: {found['attention']}, accuracy {found['accuracy']:.4f} ({low:.4f} to {high:.4f}) "
        f"on {len(correct)} texts"
    )
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    with start(args) as accelerator:
        result = stage(args, accelerator)
    accelerator.end_training()
    return result


def identity(args: Classify) -> dict[str, Any]:
    """Return the options that decide what a run finds."""
    return {field.name: getattr(args, field.name) for field in fields(args) if not field.metadata.get("elsewhere")}


Text = tuple[str, str]  # and its label


def read_texts(args: Classify) -> tuple[list[Text], list[Text]]:
    """To train on, in the order of `--seed`, and to validate on, in the order of the file."""
    train, validation = (
        list(TextSource(name, column=args.text_column).labelled(args.label_column))
        for name in (args.train_file, args.validation_file)
    )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed)).tolist()
    return [train[i] for i in order[: args.max_train_samples]], validation[: args.max_eval_samples]


def token_rows(
    texts: Sequence[Text], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Tensor:
    """One row per text: the number of its label, its tokens, then EMPTY; int64 `[N, 1 + the longest]`."""
    numbers = {label: i for i, label in enumerate(labels)}
    for _, label in texts:
        if label not in numbers:
            raise UsageError(f"label {label!r} is not among those of the training file: {', '.join(labels)}")
    ids = tokenizer([text for text, _ in texts], truncation=True, max_length=max_length).input_ids
    longest = max(map(len, ids))
    return torch.tensor(
        [
            [numbers[label], *tokens, *[EMPTY] * (longest - len(tokens))]
            for (_, label), tokens in zip(texts, ids, strict=True)
        ]
    )


def by_length(rows: Tensor, size: int) -> Tensor:
    """Groups of `size` rows of about one length, `[N / size, size, n]`; rows that fill no group are left out."""
    count = len(rows) // size * size
    if not count:
        raise UsageError(f"the training file has {len(rows)} texts, less than one batch of {size}")
    rows = rows[:count]
    return rows[lengths(rows).argsort(stable=True)].view(-1, size, rows.shape[1])


def lengths(rows: Tensor) -> Tensor:
    return (rows[:, 1:] != EMPTY).sum(1)


def by_tokens(groups: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the groups `[N, size, n]`, each drawn as often as it has tokens."""
    weights = lengths(groups.flatten(0, 1)).view(groups.shape[:2]).sum(1).double()
    return groups[weights.multinomial(count, replacement=True, generator=torch.Generator().manual_seed(seed))]


def inputs(rows: Tensor, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """What the model takes for these rows, cut to the longest of them."""
    ids = rows[:, 1 : 1 + int(lengths(rows).max())]
    real = ids != EMPTY
    return {"input_ids": ids.masked_fill(~real, tokenizer.pad_token_id or 0), "attention_mask": real.long()}


def align(
    args: Classify,
    accelerator: Accelerator,
    model: PreTrainedModel,
    loader: Batches,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any] | None:
    """Train the parameters of new variants, if there are any, unless a checkpoint of what comes after holds them."""
    parameters = any(next(variant.parameters(), None) is not None for variant in swapped_modules(model).values())
    if not (args.attention and args.align_steps and parameters):
        return None
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UsageError("alignment does not work under FSDP: launch with distributed_type: MULTI_GPU")
    output_dir = args.output_dir / "alignment"
    if args.resume_from_checkpoint and find_checkpoint(args.resume_from_checkpoint, args.output_dir):
        losses = [json.loads(line)["loss"] for line in (output_dir / "training_log.jsonl").read_text().splitlines()]
    else:
        # An accelerator of its own: a checkpoint holds all that an accelerator has prepared.
        own = build_accelerator(accelerator.gradient_accumulation_steps)
        per_step = own.gradient_accumulation_steps * own.num_processes
        drawn = Batches(by_tokens(loader.blocks, args.align_steps * per_step, args.seed), 1, args.seed)
        calibrate(model, inputs(loader.blocks[len(loader.blocks) // 2].flatten(0, -2), tokenizer))
        trainable_parameters(model)
        with aligning(model) as layers:
            losses = run_steps(
                args,
                own,
                model,
                drawn,
                lambda model, batch: alignment_loss(model, inputs(batch.flatten(0, 1), tokenizer), layers),
                steps=args.align_steps,
                step_size=texts_per_step(args, own),
                unit="texts",
                learning_rate=args.align_learning_rate,
                output_dir=output_dir,
            )
        own.free_memory()
        model.requires_grad_(True)
    return {"steps": args.align_steps, "first_loss": losses[0], "last_loss": losses[-1]}


def fine_tune(
    args: Classify,
    accelerator: Accelerator,
    model: PreTrainedModel,
    loader: Batches,
    tokenizer: PreTrainedTokenizerBase,
) -> list[float]:
    """Train all weights; the loss of each step."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        rows = batch.flatten(0, 1)
        return model(**inputs(rows, tokenizer), labels=rows[:, 0]).loss

    per_step = accelerator.gradient_accumulation_steps * accelerator.num_processes
    steps = max(1, len(loader.blocks) * args.num_train_epochs // per_step)
    size = texts_per_step(args, accelerator)
    say(accelerator, f"{loader.blocks.shape[0] * loader.blocks.shape[1]:,} texts, {args.num_train_epochs} times")
    model.train()
    history = run_steps(args, accelerator, model, loader, loss, steps=steps, step_size=size, unit="texts")
    model.eval()
    return history


def texts_per_step(args: Classify, accelerator: Accelerator) -> int:
    return args.per_device_train_batch_size * accelerator.gradient_accumulation_steps * accelerator.num_processes


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, rows: Tensor, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[int]:
    """For each text, 1 where the model is right and 0 where it is not. The processes share the texts."""
    batches = lengths(rows).argsort(stable=True).split(batch_size)
    found = []
    with unit_bar(accelerator, len(rows), unit="texts") as bar:
        bar.set_description("validation", refresh=False)
        for first in range(0, len(batches), accelerator.num_processes):
            # The last ones may come twice: a sharded model needs all processes in every forward pass.
            own = batches[min(first + accelerator.process_index, len(batches) - 1)]
            batch = rows[own].to(accelerator.device)
            right = model(**inputs(batch, tokenizer)).logits.argmax(-1) == batch[:, 0]
            found += zip(own.tolist(), right.int().tolist(), strict=True)
            bar.update(len(own) * accelerator.num_processes)
    by_text = dict(gather_object(found))
    return [by_text[i] for i in range(len(rows))]


def accuracy(correct: Sequence[int]) -> dict[str, Any]:
    """With its standard error and Wilson's 95 % interval, which has no zero width where all are right."""
    n, p, z = len(correct), sum(correct) / len(correct), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {
        "accuracy": p,
        "standard_error": math.sqrt(p * (1 - p) / n),
        "interval_95": [(centre + sign * half) / (1 + z * z / n) for sign in (-1, 1)],
    }


if __name__ == "__main__":
    with one_line_errors("classify"):
        main()
