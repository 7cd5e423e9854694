"""Measure and log the perplexity of held-out text while a stage trains, over all processes."""

import json
import math
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..evaluation.processes import shared_perplexity
from ..launch import say
from ..sources.files import write_whole
from ..sources.texts import TextSource, token_blocks
from ..sources.tokens import default_folder


def read_validation(options, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """Return the blocks to validate on, `[N, block_size]`; None where no such text is given."""
    if options.validation_file is None:
        return None
    source = TextSource(options.validation_file, column=options.text_column)
    with accelerator.local_main_process_first():
        return token_blocks(
            source,
            tokenizer,
            options.block_size,
            max_tokens=options.max_validation_tokens,
            cache_dir=default_folder(),
        )


def log_validation(
    accelerator: Accelerator, model: nn.Module, blocks: Tensor, log: Path, step: int, tokens: int, given: int = 1
) -> None:
    """Measure the perplexity of `blocks` after `step` and add it to the log.

    Entries of `step` and later steps, which a run that was cut off left in the log, are removed.

    Args:
        blocks: integers `[N, n]`.
        log: the file `validation_log.jsonl`.
        tokens: tokens trained on so far.
        given: tokens that begin every block and are not predicted.
    """
    result = shared_perplexity(accelerator, model, blocks.long(), given=given)
    if not accelerator.is_main_process:
        return
    lines = log.read_text().splitlines() if log.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    entry = {"step": step, "tokens": tokens, "perplexity": result.perplexity, "nll": result.mean}
    if not math.isnan(result.standard_error):
        entry["standard_error"] = result.standard_error
    log.parent.mkdir(parents=True, exist_ok=True)
    write_whole(log, "".join(f"{line}\n" for line in [*kept, json.dumps(entry)]).encode())
    accelerator.log({"validation_perplexity": result.perplexity}, step=step)
    say(accelerator, f"step {step}: perplexity {result.perplexity:.3f} on the validation text")
