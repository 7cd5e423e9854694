"""Measure perplexity over several processes: each measures a share of the blocks, and all processes get all results."""

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from .perplexity import Perplexity, block_perplexity


def shared_perplexity(
    accelerator: Accelerator,
    model: nn.Module,
    blocks: Tensor,
    progress: Callable[[int], None] | None = None,
    given: int = 1,
) -> Perplexity:
    """Return the perplexity of blocks of tokens that are shared out among the processes.

    All processes take equally many blocks, some of the blocks twice, because under FSDP every process has to take part
    in each forward pass.

    Args:
        blocks: int64 `[N, n]`; each block is a context.
        progress: called with the number of blocks that this process has measured since the last call.
        given: tokens at the start of each block that are not predicted.
    """
    share, context = blocks_of_process(accelerator, len(blocks)), blocks.shape[1]
    nll = block_perplexity(model, blocks[share], given, progress=progress).nll
    by_block = dict(gather_object(list(zip(share, nll, strict=True))))
    return Perplexity(context, tuple(by_block[block] for block in range(len(blocks))), given=given)


def blocks_of_process(accelerator: Accelerator, count: int) -> list[int]:
    """Return the indices of those of `count` blocks that this process measures, equally many for each process."""
    rounds = range(0, count, accelerator.num_processes)
    return [(first + accelerator.process_index) % count for first in rounds]
