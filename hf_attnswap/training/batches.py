"""Draw batches of token blocks in an endless order, and make the inputs of a model from each."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError


@dataclass(frozen=True, eq=False)
class Batches:
    """Draw batches of blocks in an endless order, in which each epoch is shuffled anew.

    A batch is a function of its number and the seed alone. So a run can continue from any step, on any number of
    processes, and see the same tokens.

    Attributes:
        blocks: token blocks or examples, integers `[N, n, ...]`.
        batch_size: blocks per batch.
        seed: seed of the order.
        text_lengths: the lengths of the texts into which the batches are cut in turn, each a divisor of n; none leaves
            blocks whole.
        start: the tokens with which every text begins, in place of those that stand there.
    """

    blocks: Tensor
    batch_size: int
    seed: int
    text_lengths: tuple[int, ...] = ()
    start: tuple[int, ...] = ()

    def __getitem__(self, number: int) -> Tensor:
        """Return batch `number`, int64 `[batch_size, n, ...]`, or `[batch_size n / l, l]` where it is cut into texts.

        A batch may reach into the next epoch.
        """
        length, first = len(self.blocks), number * self.batch_size
        positions = range(first, first + self.batch_size)
        batch = self.blocks[[_order(length, self.seed, p // length)[p % length] for p in positions]].long()
        if self.text_lengths:
            batch = batch.view(-1, self.text_lengths[number % len(self.text_lengths)])
            batch[:, : len(self.start)] = batch.new_tensor(self.start)
        return batch


@functools.lru_cache(maxsize=2)
def _order(length: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(length, generator=generator).tolist()


def batches(
    blocks: Tensor, batch_size: int, seed: int, text_lengths: Sequence[int] = (), start: Sequence[int] = ()
) -> Batches:
    """Return the batches of token blocks `[N, n, ...]`; the arguments are the attributes of `Batches`.

    Raises:
        UsageError: the blocks do not fill one batch.
    """
    if len(blocks) < batch_size:
        raise UsageError(f"the training text gives {len(blocks)} blocks, less than one batch of {batch_size}")
    return Batches(blocks, batch_size, seed, tuple(text_lengths), tuple(start))


def model_inputs(batch: Tensor | Mapping[str, Any], last_logits_only: bool = False) -> dict[str, Any]:
    """Return the keyword arguments of a language model for a batch of token blocks; a mapping is returned as a dict.

    Args:
        batch: token blocks `[B, n]`; or `[B, n, 2]` where documents are separate (see `sources.texts.token_blocks`). In
            the second form positions begin anew with each document, which tells transformers that attention must not
            reach across.
        last_logits_only: compute the logits of the last token only, for losses that do not need the others.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    inputs = {"input_ids": batch, "use_cache": False, **({"logits_to_keep": 1} if last_logits_only else {})}
    if batch.dim() == 2:
        inputs["attention_mask"] = torch.ones_like(batch)  # else torch.compile is given a matrix
    else:
        here = torch.arange(batch.shape[1], device=batch.device).expand(batch.shape[:2])
        begin = (here * batch[..., 1]).cummax(dim=1).values
        inputs |= {"input_ids": batch[..., 0], "position_ids": here - begin}
    return inputs


def next_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Return the labels `[B, n]` for `inputs`; the first token of a separate document has the label -100."""
    positions = inputs.get("position_ids")
    return inputs["input_ids"] if positions is None else inputs["input_ids"].masked_fill(positions == 0, -100)


@torch.no_grad()
def require_separate(model: nn.Module) -> None:
    """Check on a small example that the model keeps the documents of one row apart.

    Raises:
        UsageError: a document changes the logits of the next one in its row, since the model does not make its mask
            from positions.
    """
    device = next(model.parameters()).device
    rows = torch.tensor([[[3, 1], [4, 0], [5, 0], [6, 1], [7, 0]], [[8, 1], [9, 0], [2, 0], [6, 1], [7, 0]]])
    first, other = (model(**model_inputs(row[None].to(device))).logits[:, 3:] for row in rows)
    if not torch.allclose(first, other, rtol=1e-3, atol=1e-3):
        raise UsageError(
            f"{type(model).__name__} does not keep documents of one row apart by their positions: train without "
            "separate documents"
        )
