"""Say what a model has to predict of a text: the next token everywhere, or the tokens that it cannot see."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..integration.objectives import objective

NOTHING = -100  # stands in labels where nothing is predicted
MASKED = 0.15  # of the tokens


def next_token_labels(blocks: Tensor) -> Tensor:
    """Return the token that follows each token of `[N, n]`, and `NOTHING` for the last ones."""
    return torch.cat([blocks[:, 1:], torch.full_like(blocks[:, :1], NOTHING)], dim=1)


def masked(blocks: Tensor, mask_token_id: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mask 15 % of the tokens of each text, drawn at random, one at least.

    Args:
        blocks: int64 `[N, n]`.
        mask_token_id: what stands for a masked token.

    Returns:
        The texts with the masks, and the labels: the tokens that were masked, elsewhere `NOTHING`; int64 `[N, n]`.
    """
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(MASKED * blocks.shape[1]))
    order = torch.rand(blocks.shape, generator=generator).argsort(dim=1)[:, :count]
    hidden = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, order, True)
    return blocks.masked_fill(hidden, mask_token_id), blocks.masked_fill(~hidden, NOTHING)


def predicted(
    model: PreTrainedModel, blocks: Tensor, mask_token_id: int | None, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Return what `model` reads of texts, int64 `[N, n]`, and the labels of what it predicts; None for next tokens.

    Args:
        blocks: texts, int64 `[N, n]`.
        mask_token_id: what stands for a masked token, for masked models.

    Raises:
        UsageError: the model predicts no tokens, or it is a masked model and there is no token for what is masked.
    """
    require_predictions(model, mask_token_id)
    return (blocks, None) if objective(model) == "next tokens" else masked(blocks, mask_token_id, seed)


def require_predictions(model: PreTrainedModel, mask_token_id: int | None) -> None:
    """Raise UsageError where the model predicts no tokens, or masked ones and there is no token for a mask."""
    predicts = objective(model)
    if predicts == "next tokens":
        return
    if predicts != "masked tokens":
        raise UsageError(
            f"{type(model).__name__} predicts no tokens, so there is no likelihood to look at: compare it with the "
            "original by `attnswap evaluate --control ORIGINAL`"
        )
    if mask_token_id is None:
        raise UsageError(f"{type(model).__name__} predicts masked tokens, and its tokenizer has none for a mask")
