"""Differences to a control on the same items, with an interval and a word for what it allows to say.

What both find hard cancels in a difference, so a small one shows where two intervals would overlap.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..statistics import expanded_tail

FEW = 500  # with fewer items than this an interval is shown, and marked
VERDICTS = ("better", "no measurable difference", "worse")


@dataclass(frozen=True)
class Difference:
    """Ours less the control's, with its 95 % interval (NaN for a single item) and the number of items."""

    value: float
    low: float
    high: float
    items: int

    @property
    def few(self) -> bool:
        return self.items < FEW

    def verdict(self, lower_is_better: bool = False) -> str:
        """One of `VERDICTS`: a difference is an interval without zero."""
        if not (self.low > 0 or self.high < 0):
            return VERDICTS[1]
        return VERDICTS[0] if (self.high < 0) == lower_is_better else VERDICTS[2]


def paired_bootstrap(
    ours: Sequence[Any],
    control: Sequence[Any],
    *,
    aggregate: Callable[[Sequence[Any]], float] | None = None,
    resamples: int = 4000,
    seed: int = 0,
) -> Difference:
    """The difference over items and its 95 % interval, from resampled items (Koehn 2004).

    The percentiles are those of the expanded interval of Hesterberg, "What teachers should know about the bootstrap",
    2015: the plain one is too narrow for few items, by a fifth for 8.

    Args:
        ours, control: one score per item, the same items in the same order.
        aggregate: makes one number of scores; None for the mean, which is much faster.

    Raises:
        ValueError: different numbers of items, or none.
    """
    n = len(ours)
    if n != len(control) or not n:
        raise ValueError(f"a paired comparison needs the same items for both, got {n} and {len(control)}")
    if aggregate is None:
        difference = torch.tensor(ours, dtype=torch.float64) - torch.tensor(control, dtype=torch.float64)
        value = difference.mean().item()
    else:
        value = float(aggregate(ours) - aggregate(control))
    if n == 1:
        return Difference(value, math.nan, math.nan, 1)
    tail = expanded_tail(n)
    if aggregate is None:
        drawn = _resampled_means(difference, resamples, seed)
    else:
        pairs = list(zip(ours, control, strict=True))
        drawn = resampled(
            pairs, lambda some: aggregate([a for a, _ in some]) - aggregate([b for _, b in some]), resamples, seed
        )
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Difference(value, low, high, n)


def resampled(
    items: Sequence[Any], statistic: Callable[[Sequence[Any]], float], resamples: int, seed: int = 0
) -> Tensor:
    """The statistic of as many items drawn with replacement, again and again: float64 `[resamples]`."""
    generator, n = torch.Generator().manual_seed(seed), len(items)
    draws = (torch.randint(n, (n,), generator=generator).tolist() for _ in range(resamples))
    return torch.tensor([float(statistic([items[i] for i in draw])) for draw in draws], dtype=torch.float64)


def _resampled_means(items: Tensor, resamples: int, seed: int) -> Tensor:
    """`resampled` with the mean, many at a time."""
    generator, n = torch.Generator().manual_seed(seed), len(items)
    rows = max(1, 1_000_000 // n)
    return torch.cat(
        [
            items[torch.randint(n, (min(rows, resamples - done), n), generator=generator)].mean(1)
            for done in range(0, resamples, rows)
        ]
    )
