"""The perplexity of held-out text, over all processes, and its log while a script trains."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from launch import say
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_attnswap.evaluation.perplexity import Perplexity, perplexity
from hf_attnswap.sources.files import write_whole
from hf_attnswap.sources.texts import TextSource, token_blocks
from hf_attnswap.sources.tokens import default_folder


def read_validation(
    args: argparse.Namespace, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase
) -> Tensor | None:
    """The blocks to validate on, `[N, block_size]`; None where there is no such text."""
    if args.validation_file is None:
        return None
    source = TextSource(args.validation_file, column=args.text_column)
    with accelerator.local_main_process_first():
        return token_blocks(
            source, tokenizer, args.block_size, max_tokens=args.max_validation_tokens, cache_dir=default_folder()
        )


def log_validation(
    accelerator: Accelerator, model: nn.Module, blocks: Tensor, log: Path, step: int, tokens: int
) -> None:
    """Add the perplexity after `step` to the log; what a run cut off had logged from there on goes."""
    found = shared_perplexity(accelerator, model, blocks.long())
    if not accelerator.is_main_process:
        return
    lines = log.read_text().splitlines() if log.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    entry = {"step": step, "tokens": tokens, "perplexity": found.perplexity, "nll": found.mean}
    if not math.isnan(found.standard_error):
        entry["standard_error"] = found.standard_error
    log.parent.mkdir(parents=True, exist_ok=True)
    write_whole(log, "".join(f"{line}\n" for line in [*kept, json.dumps(entry)]).encode())
    accelerator.log({"validation_perplexity": found.perplexity}, step=step)
    say(accelerator, f"step {step}: perplexity {found.perplexity:.3f} on the validation text")


def shared_perplexity(
    accelerator: Accelerator, model: nn.Module, blocks: Tensor, progress: Callable[[int], None] | None = None
) -> Perplexity:
    """Of blocks `[N, n]`: this process takes every so many-th, and all of them gather what they found. All take equally
    many, some of them twice, because under FSDP each forward pass is one of all processes."""
    own, context = own_blocks(accelerator, len(blocks)), blocks.shape[1]
    nll = perplexity(model, blocks[own], context, progress=progress).nll
    by_block = dict(gather_object(list(zip(own, nll, strict=True))))
    return Perplexity(context, tuple(by_block[block] for block in range(len(blocks))))


def own_blocks(accelerator: Accelerator, count: int) -> list[int]:
    """Which of `count` blocks this process measures."""
    rounds = range(0, count, accelerator.num_processes)
    return [(first + accelerator.process_index) % count for first in rounds]
