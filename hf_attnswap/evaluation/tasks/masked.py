"""Measure a masked language model: what it makes of tokens that it cannot see.

Each of some tokens is masked alone, and the model sees all others: the pseudo-log-likelihood of Salazar et al., "Masked
language model scoring", 2020, on a sample of the tokens. Masked together, tokens would hide one another's context.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...integration.objectives import input_device
from ...sources.blocks import cut, end_tokens, start_tokens
from ..result import Result, perplexity
from .base import Task
from .registry import register


@register
@dataclass(frozen=True)
class MaskedTask(Task):
    """Mask some tokens of each text of a set length, one at a time.

    Attributes:
        texts: texts per length where `TaskInputs.limit` is None.
        masked: tokens of each text that are masked, one at a time.
    """

    name = "masked"
    measures = "How often a masked model says the token that was masked, and its pseudo-perplexity."
    objectives = ("masked tokens",)
    text_tokens = 1
    texts: int = 16
    masked: int = 16

    def run(self, model, tokenizer, inputs, control=None) -> list[Result]:
        if tokenizer.mask_token_id is None:
            raise UsageError(f"task {self.name!r} needs a token for what is masked, and the tokenizer has none")
        results = []
        for length in inputs.lengths:
            texts = self.blocks(tokenizer, inputs.tokens, length)[: inputs.limit or self.texts]
            start, end = len(start_tokens(tokenizer)), len(end_tokens(tokenizer))
            places = draw_places(len(texts), range(start, length - end), self.masked, inputs.seed)
            found = masked_likelihoods(model, texts, places, tokenizer.mask_token_id, inputs.batch_size)
            name = f"{self.name} at {length}"
            results.append(Result(name, "accuracy", tuple(found.right.double().mean(1).tolist())))
            scores = tuple(found.log_likelihood.double().mean(1).tolist())
            results.append(Result(name, "pseudo-perplexity", scores, higher_is_better=False, aggregate=perplexity))
        return results

    def blocks(self, tokenizer, stream: Tensor, length: int) -> Tensor:
        """Return the texts, int64 `[N, length]`, which begin and end as the tokenizer begins and ends every text.

        Raises:
            UsageError: the text is shorter than one block.
        """
        blocks = cut(stream.reshape(-1), length, start_tokens(tokenizer), end_tokens(tokenizer))
        if not len(blocks):
            raise UsageError(f"task {self.name!r} needs a text of {length} tokens, there are {stream.numel()}")
        return blocks


def draw_places(texts: int, places: range, masked: int, seed: int = 0) -> Tensor:
    """Draw `masked` of the places of each text, or all where there are fewer: int64 `[texts, masked]`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(places), generator=generator)[:masked] + places.start for _ in range(texts)]
    return torch.stack(drawn).sort(dim=1).values


@dataclass(frozen=True)
class Masked:
    """Hold what a model makes of masked tokens, by text and place.

    Attributes:
        log_likelihood: of the token that was masked, nats, float32 `[N, m]`.
        right: whether that token is the most likely one, bool `[N, m]`.
    """

    log_likelihood: Tensor
    right: Tensor


@torch.no_grad()
def masked_likelihoods(
    model: nn.Module, texts: Tensor, places: Tensor, mask_token_id: int, batch_size: int = 8
) -> Masked:
    """Mask one token at a time and return how likely the model thinks the token that stood there.

    Args:
        texts: int64 `[N, n]`.
        places: which tokens of each text are masked, int64 `[N, m]`.
        mask_token_id: what stands for a masked token.
        batch_size: texts per forward pass.
    """
    device = input_device(model)
    rows = texts.repeat_interleave(places.shape[1], dim=0)
    flat = places.flatten()
    values, right = [], []
    for at in range(0, len(rows), batch_size):
        batch, hidden = rows[at : at + batch_size].clone(), flat[at : at + batch_size]
        own = torch.arange(len(batch))
        token = batch[own, hidden].to(device)
        batch[own, hidden] = mask_token_id
        logits = model(input_ids=batch.to(device)).logits[own, hidden].float()
        values.append(-nn.functional.cross_entropy(logits, token, reduction="none").cpu())
        right.append((logits.argmax(-1) == token).cpu())
    return Masked(torch.cat(values).view(places.shape), torch.cat(right).view(places.shape))
