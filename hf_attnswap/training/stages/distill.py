"""Distil the original model into the swapped one: the same next-token distribution, on any text.

The original is the teacher. With LoRA it is the model itself, with softmax switched on and LoRA off, so that one copy
of the weights is in memory; without, a frozen copy of the model as it starts, with softmax switched on. Both are the
original as long as nothing but the swapped attention's own parameters has been trained; else name the original with
--teacher_name_or_path.

    accelerate launch examples/distill.py --model_name_or_path aligned/model --train_file book.txt \\
        --max_train_tokens 500000 --output_dir distilled
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from arguments import add_whole_model_arguments, training_parser
from launch import run_script
from lora import add_lora_arguments, merged, with_lora_if_asked
from torch import nn
from training_run import freeze_as_asked, load_as_asked, read_text, run, save
from validation import read_validation

from hf_attnswap import UsageError
from hf_attnswap.errors import one_line_errors
from hf_attnswap.integration.swapping import describe, swapped_modules
from hf_attnswap.sources.models import load
from hf_attnswap.training.distill import DEFAULT_LEARNING_RATE, distillation_loss
from hf_attnswap.training.recompute import recompute_layers
from hf_attnswap.training.teacher import frozen


def build_parser() -> argparse.ArgumentParser:
    parser = training_parser(__doc__, DEFAULT_LEARNING_RATE)
    parser.add_argument("--teacher_name_or_path", help="the original model (default: the model itself, with softmax)")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default: %(default)s)")
    parser.add_argument(
        "--hidden_weight",
        type=float,
        default=0.0,
        help="of the cosine distance of each layer's hidden states, beside the divergence (default: %(default)s)",
    )
    add_whole_model_arguments(parser)
    add_lora_arguments(parser)
    return parser


def stage(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UsageError(
            "distillation does not work under FSDP, which shards the output embeddings: use multi_gpu.yaml"
        )
    model, tokenizer = load_as_asked(args, accelerator)
    if not swapped_modules(model):
        raise UsageError(f"the attention of {args.model_name_or_path!r} is not swapped: give --attention")
    freeze_as_asked(model, args)
    trained = with_lora_if_asked(model, args, accelerator)
    teacher = find_teacher(args, accelerator, trained)

    def loss(model: nn.Module, batch):
        with accelerator.autocast():
            return distillation_loss(
                model, teacher, batch, temperature=args.temperature, hidden_weight=args.hidden_weight
            )

    if args.gradient_checkpointing:
        recompute_layers(trained)
    blocks, validation = (read(args, accelerator, tokenizer) for read in (read_text, read_validation))
    history = run(args, accelerator, trained, blocks, loss, validation)
    model = merged(trained)
    folder = save(args, accelerator, model, tokenizer)
    accelerator.print(f"{folder}: {describe(model)}, loss {history[0]:.4f} -> {history[-1]:.4f}")
    return folder


def find_teacher(args: argparse.Namespace, accelerator: Accelerator, model: nn.Module) -> nn.Module:
    if args.teacher_name_or_path:
        return frozen(load(args.teacher_name_or_path, dtype=args.dtype, device=accelerator.device)[0])
    return model if args.use_lora else frozen(copy.deepcopy(model))


def main(argv: Sequence[str] | None = None) -> None:
    run_script(build_parser(), stage, argv)


if __name__ == "__main__":
    with one_line_errors("distill"):
        main()
