"""Measure plans by real swaps on held-out text, beside softmax on the same texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..integration.swapping import restore, swap
from ..statistics import Estimate, paired_bootstrap
from .groups import Groups
from .losses import Text, Texts, answer, distance, nll


@dataclass(frozen=True)
class HeldOut:
    """Hold the texts that measure plans.

    Attributes:
        plain: texts that follow one another. twice: texts whose second half repeats the first; none for models that
            tell no tokens.
    """

    plain: tuple[Text, ...]
    twice: tuple[Text, ...]

    @classmethod
    def of(cls, texts: Texts, stream: Tensor, count: int, copies: int) -> "HeldOut":
        """Return the first `count` texts of a stream `[n]`, and `copies` that are written twice."""
        plain = tuple(texts.plain(stream, number * texts.own, seed=number) for number in range(count))
        number_of_copies = copies if texts.tells_tokens else 0
        twice = tuple(texts.twice(stream, number * texts.own, seed=number) for number in range(number_of_copies))
        return cls(plain, twice)


@torch.no_grad()
def measure(model: PreTrainedModel, groups: Groups, kept: Sequence[int] | None, held_out: HeldOut) -> dict[str, Any]:
    """Swap, measure and restore a model, and return per text what is lost, as JSON.

    Args:
        model: not swapped.
        kept: places of the groups that keep softmax; None for softmax everywhere.

    Returns:
        `plain` and `twice`, per text the mean negative log-likelihood of what it tells, nats per token; of models that
        tell no tokens their answers, lists of numbers.
    """
    if kept is not None:
        swap(model, groups.config(kept))
    try:
        found: dict[str, list[Any]] = {"plain": [], "twice": []}
        for kind, texts in (("plain", held_out.plain), ("twice", held_out.twice)):
            for text in texts:
                told = answer(model, text)
                found[kind].append(told.tolist() if text.labels is None else nll(told, text.labels))
    finally:
        if kept is not None:
            restore(model)
    return found


def damage(ours: dict[str, Any], softmax: dict[str, Any], held_out: HeldOut) -> list[float]:
    """Return what is lost on each plain text beside softmax: nats per token, or the distance of the answers."""
    if held_out.plain[0].labels is not None:
        return [a - b for a, b in zip(ours["plain"], softmax["plain"], strict=True)]
    pairs = zip(ours["plain"], softmax["plain"], held_out.plain, strict=True)
    return [distance(torch.tensor(b), torch.tensor(a), text).item() for a, b, text in pairs]


def between(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Return the mean of what we lose beyond them on the same texts, with its 95 % interval."""
    return paired_bootstrap(list(ours), list(theirs))


def as_ratio(found: Estimate) -> dict[str, Any]:
    """Return a difference in nats as a ratio of perplexities: `value`, `low`, `high`, `items` and `few`."""
    logs = {"value": found.value, "low": found.low, "high": found.high}
    bounds = {name: None if log is None else math.exp(min(log, 700)) for name, log in logs.items()}
    return bounds | {"items": found.items, "few": found.few}


def as_difference(found: Estimate) -> dict[str, Any]:
    """Return a difference as it is: `value`, `low`, `high`, `items` and `few`."""
    return {"value": found.value, "low": found.low, "high": found.high, "items": found.items, "few": found.few}
