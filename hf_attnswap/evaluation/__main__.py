"""Measure the perplexity of a model, swapped or not, by context length, with its standard error.

Every block of text is a context of its own. Under accelerate launch the processes share the blocks.

    accelerate launch -m hf_attnswap.evaluation --model_name_or_path aligned/model --validation_file book.txt \\
        --context_length 512 --context_length 2048 --output_file perplexity.json
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..errors import Parser, UsageError, one_line_errors
from ..integration.objectives import require_positions
from ..integration.swapping import describe
from ..launch import build_accelerator, unit_bar
from ..sources.blocks import cut, start_tokens
from ..sources.files import require_file, write_whole
from ..sources.models import load
from ..sources.texts import TextSource, token_stream
from ..statistics import FEW
from .processes import blocks_of_process, shared_perplexity
from .tasks import quality_task


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, print a table, and write the numbers to `--output_file` as JSON."""
    parser = Parser(prog="hf_attnswap.evaluation", description=__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="a Hub id, a folder or a .gguf file")
    parser.add_argument("--dtype", default="float32", help="dtype of the weights (default: %(default)s)")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--validation_file", help="text, json, jsonl, parquet, csv or tsv")
    text.add_argument("--dataset_name", help="a dataset of the Hub")
    parser.add_argument("--dataset_config_name", help="configuration of the dataset")
    parser.add_argument("--text_column", default="text", help="column that holds the text (default: %(default)s)")
    parser.add_argument("--split", default="test", help="split of the dataset (default: %(default)s)")
    parser.add_argument("--context_length", type=int, action="append", help="may be repeated (default: 512)")
    parser.add_argument("--max_eval_tokens", type=int, help="(default: 500 blocks of each context length)")
    parser.add_argument("--output_file", type=Path, help="where the numbers go, as JSON")
    args = parser.parse_args(argv)
    contexts = args.context_length or [512]
    if min(contexts) < 2:
        raise UsageError(f"--context_length is {min(contexts)}; expected at least 2 tokens")
    if args.output_file is not None:
        require_file(args.output_file)
    accelerator = build_accelerator()
    model, tokenizer = load(args.model_name_or_path, dtype=args.dtype, device=accelerator.device)
    task = quality_task(model)
    if task is not None:
        raise UsageError(f"{type(model).__name__} predicts no next tokens: measure it by `attnswap evaluate` ({task})")
    require_positions(model, max(contexts), "--context_length")
    model = accelerator.prepare_model(model, evaluation_mode=True)
    source = TextSource(
        args.validation_file or args.dataset_name,
        split=args.split,
        config_name=args.dataset_config_name,
        column=args.text_column,
    )
    start = start_tokens(tokenizer)
    blocks = {n: max(args.max_eval_tokens, *contexts) // n if args.max_eval_tokens else FEW for n in contexts}
    most = max(n * count for n, count in blocks.items())
    stream = token_stream(source, tokenizer, most)
    if not len(cut(stream, max(contexts), start)):
        raise UsageError(
            f"text {source.name!r} gives {len(stream)} tokens, less than one block of {max(contexts)}: "
            "give more text or a shorter context"
        )
    rows = [measure(accelerator, model, cut(stream, n, start)[: blocks[n]], start) for n in contexts]
    if not accelerator.is_main_process:
        return
    if args.output_file is not None:
        result = {"model": args.model_name_or_path, "attention": describe(model), "text": source.name, "rows": rows}
        write_whole(args.output_file, json.dumps(result, indent=1).encode())
    table = Table(title=f"{args.model_name_or_path}: {describe(model)}, on {source.name}")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*("?" if v is None else str(v) if isinstance(v, int) else f"{v:.4f}" for v in row.values()))
    Console(markup=False, emoji=False).print(table)  # [brackets] are part of a name


def measure(
    accelerator: Accelerator, model: nn.Module, blocks: Tensor, start: Sequence[int] = ()
) -> dict[str, float | int | None]:
    """Return the row of the table for one context length, computed by all processes together.

    Args:
        blocks: int64 `[N, context]`.
        start: what each of them begins with, see `sources.blocks.start_tokens`.

    Returns:
        `context`, `perplexity`, `nll` (nats per token), `standard_error` (of `nll`; None for a single block) and
        `tokens` (the number of tokens predicted).
    """
    context = blocks.shape[1]
    share = len(blocks_of_process(accelerator, len(blocks)))
    with unit_bar(accelerator, share * context) as bar:
        bar.set_description(f"context {context}", refresh=False)
        result = shared_perplexity(accelerator, model, blocks, lambda n: bar.update(n * context), max(1, len(start)))
    return {
        "context": context,
        "perplexity": result.perplexity,
        "nll": result.mean,
        "standard_error": None if math.isnan(result.standard_error) else result.standard_error,
        "tokens": result.tokens,
    }


if __name__ == "__main__":
    with one_line_errors("hf_attnswap.evaluation"):
        main()
