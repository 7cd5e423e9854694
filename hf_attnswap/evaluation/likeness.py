"""Compare what a model makes of given inputs with what the original makes of them: for models that predict no tokens.

The inputs are whatever the models take, so this measures classifiers and encoders of texts, of images and of sound:

    inputs = [processor(image, return_tensors="pt") for image in images]
    agreement, cosine = likeness(swapped, original, inputs)
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..errors import UsageError
from ..integration.objectives import input_device
from .result import Result

Inputs = Mapping[str, Tensor]


def likeness(model: nn.Module, original: nn.Module, inputs: Iterable[Inputs], task: str = "likeness") -> list[Result]:
    """Return how like the original a model answers to the same inputs, item by item (see `compare`).

    Args:
        model, original: models that take the same inputs, in eval mode.
        inputs: batches of what both take, by name; rows are items.
        task: name of the task in the results.

    Raises:
        UsageError: there are no inputs, or nothing that a model returns can be compared.
    """
    batches = list(inputs)
    return compare(answers(model, batches), answers(original, batches), task)


@torch.no_grad()
def answers(model: nn.Module, inputs: Iterable[Inputs]) -> dict[str, Any]:
    """Return what a model answers to each item, as JSON values.

    Args:
        inputs: batches of what the model takes, by name; tokens that an `attention_mask` hides do not count.

    Returns:
        `labels`, how many labels the model chooses from (None for a model without logits), and `values`, per item a
        list of numbers: the logits, those of one place after those of another; or the mean of the last hidden states
        over the tokens.

    Raises:
        UsageError: nothing that the model returns can be compared.
    """
    labels, values = None, []
    for batch in inputs:
        output, is_logits = _output(model, batch)
        if is_logits:
            labels = output.shape[-1]
        elif output.dim() == 3:
            output = _mean_over_tokens(output, batch.get("attention_mask"))
        values += output.flatten(1).cpu().tolist()
    return {"labels": labels, "values": values}


def _output(model: nn.Module, inputs: Inputs) -> tuple[Tensor, bool]:
    """Return the logits, or else the last hidden state, float32, and whether it is the logits."""
    device = input_device(model)
    found = model(**{name: value.to(device) for name, value in inputs.items()})
    return logits_or_hidden(found), torch.is_tensor(getattr(found, "logits", None))


def logits_or_hidden(returned: ModelOutput) -> Tensor:
    """Return the logits of what a model returned, or else its last hidden states, in float32.

    Raises:
        UsageError: there is neither.
    """
    for name in ("logits", "last_hidden_state"):
        if torch.is_tensor(getattr(returned, name, None)):
            return getattr(returned, name).float()
    raise UsageError(
        f"a {type(returned).__name__} has neither logits nor hidden states that could be compared: give what you take "
        "of it, as lists of numbers, to hf_attnswap.evaluation.likeness.compare, or compare the base models"
    )


def _mean_over_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    seen = mask.to(hidden)[..., None]
    return (hidden * seen).sum(1) / seen.sum(1).clamp(min=1)


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any], task: str = "likeness") -> list[Result]:
    """Return the likeness of what two models answered to the same items.

    - agreement: share of the places of an item where both choose the same label, for models with labels
    - cosine: of the logits of an item, or of its vector
    - absolute difference: of the number that a model with a single label gives, in place of both

    Args:
        ours, theirs: what `answers` returned for each model.
        task: name of the task in the results.

    Raises:
        UsageError: there are no items, or the models do not answer alike.
    """
    pairs = [tuple(map(torch.tensor, pair)) for pair in zip(ours["values"], theirs["values"], strict=True)]
    if not pairs:
        raise UsageError("there are no inputs to compare the models on")
    if ours["labels"] != theirs["labels"] or any(a.shape != b.shape for a, b in pairs):
        raise UsageError("the models answer with other labels or sizes, so they cannot be compared")
    labels = ours["labels"]
    if labels == 1:
        differences = tuple((a - b).abs().mean().item() for a, b in pairs)
        return [Result(task, "absolute difference", differences, higher_is_better=False)]
    found = []
    if labels:
        chosen = [[x.view(-1, labels).argmax(-1) for x in pair] for pair in pairs]
        found.append(Result(task, "agreement", tuple((a == b).double().mean().item() for a, b in chosen)))
    cosines = tuple(nn.functional.cosine_similarity(a, b, dim=0).item() for a, b in pairs)
    return [*found, Result(task, "cosine", cosines)]
