"""Measure how well a model copies: its loss on the second half of texts that are written twice."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...sources.blocks import cut, start_tokens
from ..likelihood import last_logits
from ..result import Result
from .base import Task
from .registry import register

# Rows of logits of one pass on a GPU.
ROWS_AT_ONCE = 4096


@register
@dataclass(frozen=True)
class CopyTask(Task):
    """Write held-out texts twice, so that both together have each of the lengths.

    Attributes:
        texts: texts per length where `TaskInputs.limit` is None, or as many as the held-out text gives.
    """

    name = "copy"
    measures = "The loss on the second half of a text that is written twice, nats per token: who recalls, copies."
    text_tokens = 1
    texts: int = 32

    def run(self, model, tokenizer, inputs, control=None) -> list[Result]:
        start, results = start_tokens(tokenizer), []
        for length in inputs.lengths:
            half = (length - len(start)) // 2
            halves = cut(inputs.tokens.reshape(-1), half)[: inputs.limit or self.texts] if half > 1 else ()
            if not len(halves):
                raise UsageError(
                    f"task {self.name!r} at {length} tokens needs a text of 2 to {max(half, 2)} tokens that it can "
                    f"write twice, and the held-out text has {inputs.tokens.numel()}: give more text or other lengths"
                )
            scores = tuple(copy_losses(model, halves, start))
            results.append(Result(f"{self.name} at {length}", "loss", scores, higher_is_better=False))
        return results


@torch.no_grad()
def copy_losses(model: nn.Module, halves: Tensor, start: list[int]) -> list[float]:
    """Return for each text the mean loss on its second writing, all but the first token of it, nats per token.

    That first token cannot be known: nothing says that the text begins anew. The log-softmax is computed in float32.

    Args:
        halves: what is written twice, int64 `[N, half]`.
        start: what begins every text, see `sources.blocks.start_tokens`.
    """
    device, losses, size = next(model.parameters()).device, [], halves.shape[1]
    at_once = 1 if device.type == "cpu" else max(1, ROWS_AT_ONCE // size)
    for some in halves.split(at_once):
        begin = torch.tensor(start, dtype=halves.dtype).expand(len(some), -1)
        texts = torch.cat([begin, some, some], dim=1).to(device)
        logits = last_logits(model, size, input_ids=texts)[:, :-1]
        losses += [nn.functional.cross_entropy(row.float(), text[1 - size :]).item()
                   for row, text in zip(logits, texts, strict=True)]  # fmt: skip
    return losses
