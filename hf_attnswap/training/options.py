"""The arguments that the example scripts share."""

import argparse
from pathlib import Path

from accelerate.utils import LoggerType

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


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
