"""Align a swapped model: each swapped layer learns to reproduce the softmax output of its layer.

Softmax and the new attention share one forward pass; only the new attention's own parameters train.

    accelerate launch examples/align_attention.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
        --attention hedgehog+window --train_file book.txt --max_train_tokens 500000 --output_dir aligned
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from common import read_text, run, run_script, save, swap_as_asked, training_parser

from hf_attnswap import UsageError
from hf_attnswap.errors import one_line_errors
from hf_attnswap.loading import load
from hf_attnswap.patching import describe, swapped_modules
from hf_attnswap.training.align import (
    DEFAULT_LEARNING_RATE,
    aligning,
    alignment_loss,
    calibrate,
    trainable_parameters,
)


def build_parser() -> argparse.ArgumentParser:
    return training_parser(__doc__, DEFAULT_LEARNING_RATE)


def stage(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    if accelerator.distributed_type == DistributedType.FSDP:
        # FSDP gathers a layer's parameters for the backward pass of its output; these losses arise inside the layer.
        raise UsageError("alignment does not work under FSDP, and trains few parameters: use multi_gpu.yaml")
    model, tokenizer = load(args.model_name_or_path, dtype=args.dtype, device=accelerator.device)
    blocks = read_text(args, accelerator, tokenizer)
    if not swapped_modules(model) or args.attention or args.layers or args.option:
        swap_as_asked(model, args, args.attention or "hedgehog+window")
        calibrate(model, blocks[:2])
    trainable_parameters(model)
    with aligning(model) as losses:
        history = run(args, accelerator, model, blocks, lambda model, batch: alignment_loss(model, batch, losses))
    folder = save(args, accelerator, model, tokenizer)
    accelerator.print(f"{folder}: {describe(model)}, loss {history[0]:.4f} -> {history[-1]:.4f}")
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    run_script(build_parser(), stage, argv)


if __name__ == "__main__":
    with one_line_errors("align_attention"):
        main()
