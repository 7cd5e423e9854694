"""Fine-tune a model on the next token, swapped or not: all weights, or LoRA on the attention's projections.

Train the softmax model in the same way for a control. There is no dropout but that of LoRA: the swapped attention has
none. With LoRA, the swapped attention's own parameters train in full, and the saved model is a plain one: the LoRA
weights are merged into it.

    accelerate launch examples/finetune.py --model_name_or_path aligned/model --use_lora \\
        --train_file book.txt --max_train_tokens 500000 --learning_rate 1e-4 --output_dir finetuned
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from arguments import add_whole_model_arguments, training_parser
from launch import run_script
from lora import add_lora_arguments, merged, with_lora_if_asked
from training_run import freeze_as_asked, load_as_asked, read_text, run, save
from validation import read_validation

from hf_attnswap.errors import one_line_errors
from hf_attnswap.integration.swapping import describe
from hf_attnswap.training.loop import next_token_loss
from hf_attnswap.training.recompute import recompute_layers


def build_parser() -> argparse.ArgumentParser:
    parser = training_parser(__doc__, learning_rate=5e-5)
    add_whole_model_arguments(parser)
    add_lora_arguments(parser)
    return parser


def stage(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    model, tokenizer = load_as_asked(args, accelerator)
    freeze_as_asked(model, args)
    trained = with_lora_if_asked(model, args, accelerator)
    if args.gradient_checkpointing:
        recompute_layers(trained)
    blocks, validation = (read(args, accelerator, tokenizer) for read in (read_text, read_validation))
    history = run(args, accelerator, trained, blocks, next_token_loss, validation)
    model = merged(trained)
    folder = save(args, accelerator, model, tokenizer)
    accelerator.print(f"{folder}: {describe(model)}, loss {history[0]:.4f} -> {history[-1]:.4f}")
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    run_script(build_parser(), stage, argv)


if __name__ == "__main__":
    with one_line_errors("finetune"):
        main()
