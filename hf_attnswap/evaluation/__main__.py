"""Perplexity of a model, swapped or not, by context length, with its standard error.

Every block of text is a context of its own. Under accelerate launch the processes share the blocks.

    accelerate launch examples/perplexity.py --model_name_or_path aligned/model --validation_file book.txt \\
        --context_length 512 --context_length 2048 --output_file perplexity.json
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from arguments import add_model_arguments, add_text_arguments
from launch import build_accelerator, unit_bar
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from validation import own_blocks, shared_perplexity

from hf_attnswap.errors import one_line_errors
from hf_attnswap.integration.swapping import describe
from hf_attnswap.sources.files import write_whole
from hf_attnswap.sources.models import load
from hf_attnswap.sources.texts import TextSource, token_blocks


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_text_arguments(parser, "--validation_file")
    parser.add_argument("--split", default="test", help="of the dataset (default: %(default)s)")
    parser.add_argument("--context_length", type=int, action="append", help="may be repeated (default: 512)")
    parser.add_argument("--max_eval_tokens", type=int, default=16384, help="(default: %(default)s)")
    parser.add_argument("--output_file", type=Path, help="where the numbers go, as JSON")
    args = parser.parse_args(argv)
    accelerator = build_accelerator()
    contexts = args.context_length or [512]
    model, tokenizer = load(args.model_name_or_path, dtype=args.dtype, device=accelerator.device)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    source = TextSource(
        args.validation_file or args.dataset_name,
        split=args.split,
        config_name=args.dataset_config_name,
        column=args.text_column,
    )
    tokens = token_blocks(source, tokenizer, max(contexts), max(args.max_eval_tokens, *contexts)).reshape(-1)
    rows = [measure(accelerator, model, tokens, context) for context in contexts]
    if not accelerator.is_main_process:
        return
    if args.output_file:
        found = {"model": args.model_name_or_path, "attention": describe(model), "text": source.name, "rows": rows}
        write_whole(args.output_file, json.dumps(found, indent=1).encode())
    table = Table(title=f"{args.model_name_or_path}: {describe(model)}, on {source.name}")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*("?" if v is None else str(v) if isinstance(v, int) else f"{v:.4f}" for v in row.values()))
    Console().print(table)


def measure(accelerator: Accelerator, model: nn.Module, tokens: Tensor, context: int) -> dict[str, float | int | None]:
    """One row."""
    blocks = tokens[: len(tokens) // context * context].view(-1, context)
    own = len(own_blocks(accelerator, len(blocks)))
    with unit_bar(accelerator, own * context) as bar:
        bar.set_description(f"context {context}", refresh=False)
        found = shared_perplexity(accelerator, model, blocks, progress=lambda n: bar.update(n * context))
    return {
        "context": context,
        "perplexity": found.perplexity,
        "nll": found.mean,
        "standard_error": None if math.isnan(found.standard_error) else found.standard_error,
        "tokens": found.tokens,
    }


if __name__ == "__main__":
    with one_line_errors("perplexity"):
        main()
