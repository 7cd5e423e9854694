"""Hold a metric of a task over its items, with its standard error and its paired difference to a control."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..statistics import FEW, Estimate, paired_bootstrap, resampled

Aggregate = Callable[[Sequence[Any]], float]
RESAMPLES = 1000  # of what is no mean, which takes as many calls


def mean(scores: Sequence[float]) -> float:
    """Return the arithmetic mean of `scores`."""
    return math.fsum(scores) / len(scores)


def perplexity(log_likelihoods: Sequence[float]) -> float:
    """Return the exponential of the mean negative log-likelihood over items; inf where the exponential overflows.

    The mean is over items, not over tokens, as in lm-eval for LAMBADA.

    Args:
        log_likelihoods: one per item, in nats.
    """
    loss = -mean(log_likelihoods)
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class Result:
    """Hold one metric of one task.

    Attributes:
        task: name of the task.
        metric: name of the metric.
        scores: one entry per item, in the order of the items: a number, or what `aggregate` takes, such as a
            log-likelihood with the words of the item.
        higher_is_better: whether a higher value is better.
        aggregate: makes the value from the scores. Where it is not `mean`, standard error and interval come from
            resampled items.
    """

    task: str
    metric: str
    scores: tuple[Any, ...]
    higher_is_better: bool = True
    aggregate: Aggregate = mean

    @property
    def value(self) -> float:
        """Return the value of the metric over all items."""
        return float(self.aggregate(self.scores))

    @property
    def standard_error(self) -> float:
        """Return the standard error of the value, from the spread between items; NaN for a single item."""
        n = len(self.scores)
        if n < 2:
            return math.nan
        if self.aggregate is not mean:
            return float(resampled(self.scores, self.aggregate, RESAMPLES).std(ddof=1))
        return math.sqrt(math.fsum((x - self.value) ** 2 for x in self.scores) / (n - 1) / n)

    def row(self, control: "Result | None" = None) -> dict[str, Any]:
        """Return the metric as JSON values, with the paired difference to `control` where one is given.

        `low`, `high` and `verdict` are None where the items are too few for an interval.

        Raises:
            ValueError: `control` has another number of items.
        """
        error = self.standard_error
        row = {
            "task": self.task,
            "metric": self.metric,
            "value": self.value,
            "standard_error": None if math.isnan(error) else error,
            "items": len(self.scores),
            "few": len(self.scores) < FEW,
        }
        if control is None:
            return row
        compared = self.less(control)
        bounds = {"value": compared.value, "low": compared.low, "high": compared.high, "few": compared.few}
        verdict = compared.verdict(lower_is_better=not self.higher_is_better)
        return row | {"control": control.value, "difference": bounds, "verdict": verdict}

    def less(self, control: "Result") -> Estimate:
        """Return this value minus that of `control` on the same items, with its interval.

        Raises:
            ValueError: `control` has another number of items.
        """
        given = {} if self.aggregate is mean else {"aggregate": self.aggregate, "resamples": RESAMPLES}
        return paired_bootstrap(self.scores, control.scores, **given)
