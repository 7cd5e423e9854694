"""Align a swapped model: each swapped layer learns to reproduce the softmax output of its layer.

Softmax and the new attention share one forward pass; only the new attention's own parameters train. With
--train attention its projections train too, in full or as LoRA, and whole attention modules are compared: for variants
that have no parameters, such as relu_norm. Those take `--option gain=true`, a learned factor per head.

    accelerate launch examples/align_attention.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
        --attention hedgehog+window --train_file book.txt --max_train_tokens 500000 --output_dir aligned
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from arguments import training_parser
from launch import run_script
from lora import add_lora_arguments, merged, with_lora_if_asked
from training_run import read_text, run, save, swap_as_asked

from hf_attnswap import UsageError
from hf_attnswap.errors import one_line_errors
from hf_attnswap.integration.swapping import describe, swapped_modules
from hf_attnswap.sources.models import load
from hf_attnswap.training.align import (
    DEFAULT_LEARNING_RATE,
    DEFAULT_PROJECTIONS_LEARNING_RATE,
    aligning,
    aligning_projections,
    alignment_loss,
    calibrate,
    projection_parameters,
    trainable_parameters,
)


def build_parser() -> argparse.ArgumentParser:
    parser = training_parser(__doc__, DEFAULT_LEARNING_RATE)
    parser.add_argument(
        "--train",
        choices=("new", "attention"),
        default="new",
        help="the new parameters, or the attention modules with their projections (default: %(default)s); for the "
        f"latter the papers have a --learning_rate of {DEFAULT_PROJECTIONS_LEARNING_RATE:g}",
    )
    parser.add_argument(
        "--linear_branch_alone",
        action="store_true",
        help="of X+window train the linear variant X, without the window: a first stage before the whole",
    )
    parser.add_argument(
        "--weights_loss",
        type=float,
        default=0.0,
        help="of the cross-entropy of the attention weights, beside the error of the outputs; O(n^2), for variants "
        "without negative weights (default: %(default)s)",
    )
    add_lora_arguments(parser)
    return parser


def stage(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    if accelerator.distributed_type == DistributedType.FSDP:
        # FSDP gathers a layer's parameters for the backward pass of its output; these losses arise inside the layer.
        raise UsageError("alignment does not work under FSDP, and trains few parameters: use multi_gpu.yaml")
    model, tokenizer = load(args.model_name_or_path, dtype=args.dtype, device=accelerator.device)
    blocks = read_text(args, accelerator, tokenizer)
    if not swapped_modules(model) or args.attention or args.layers or args.option:
        swap_as_asked(model, args, accelerator, args.attention or "hedgehog+window")
        calibrate(model, blocks[:2].long())
    trained, alone = model, args.linear_branch_alone
    if args.train == "new":
        if args.use_lora:
            raise UsageError("--use_lora is for the projections, which --train attention trains")
        trainable_parameters(model, alone)
        observing = aligning(model, alone, args.weights_loss)
    else:
        if alone:
            raise UsageError("--linear_branch_alone compares no whole attention modules, as --train attention does")
        if args.weights_loss:
            raise UsageError("--weights_loss compares weights on the same queries, which --train attention changes")
        projection_parameters(model)
        trained = with_lora_if_asked(model, args, accelerator)
        observing = aligning_projections(trained)
    with observing as losses:
        history = run(args, accelerator, trained, blocks, lambda model, batch: alignment_loss(model, batch, losses))
    if alone:  # the branch has another mass now
        calibrate(model, blocks[:2].long())
    model = merged(trained)
    folder = save(args, accelerator, model, tokenizer)
    accelerator.print(f"{folder}: {describe(model)}, loss {history[0]:.4f} -> {history[-1]:.4f}")
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    run_script(build_parser(), stage, argv)


if __name__ == "__main__":
    with one_line_errors("align_attention"):
        main()
