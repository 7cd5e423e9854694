"""Compute intervals of differences, growth with the length, crossings and the spread of timings: one method for each.

numpy is enough: scipy.stats would add no more than the quantile of Student's t, and the series below is within 2e-4 of
that at 7 or more degrees of freedom, the fewest on which any interval here rests.
"""

import math
import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

MIN_ITEMS = 8  # fewer resampled blocks or items say nothing of their spread
MIN_ROUNDS = 3  # of timings
MIN_LENGTHS = 3  # through two lengths every curve is a power
FEW = 500  # with fewer items than this an interval is shown, and marked as rough
VERDICTS = ("better", "no measurable difference", "worse")
RESAMPLES = 4000


def lacking(what: str, needed: int, unit: str, given: int) -> str:
    """Return the words for what is missing: "an interval needs 8 blocks, there are 4"."""
    return f"{what} needs {needed} {unit}, there {'is' if given == 1 else 'are'} {given}"


@dataclass(frozen=True)
class Estimate:
    """Hold a value over items with its 95 % interval; low and high are None where the items are too few for one."""

    value: float
    low: float | None
    high: float | None
    items: int

    @property
    def few(self) -> bool:
        """Return whether the interval rests on fewer items than `FEW`, so that the interval is rough."""
        return self.items < FEW

    def verdict(self, lower_is_better: bool = False) -> str | None:
        """Return one of `VERDICTS` for a difference: "better" or "worse" where the interval does not hold zero.

        None without an interval.

        Args:
            lower_is_better: whether a difference below zero is better.
        """
        if self.low is None or self.high is None:
            return None
        if not (self.low > 0 or self.high < 0):
            return VERDICTS[1]
        return VERDICTS[0] if (self.high < 0) == lower_is_better else VERDICTS[2]


def estimate(value: float, drawn: Sequence[float] | np.ndarray, items: int) -> Estimate:
    """Return `value` with the 95 % interval of its bootstrap distribution `drawn`, made of `items` items.

    The percentiles are those of the expanded interval of Hesterberg, "What teachers should know about the bootstrap",
    2015, section 5: the plain 2.5 % and 97.5 % make it too narrow for few items, by a fifth for 8. There is no interval
    for fewer than `MIN_ITEMS` items, nor where a resample is not finite.
    """
    drawn = np.asarray(drawn, dtype=np.float64)
    if items < MIN_ITEMS or not math.isfinite(value) or not np.isfinite(drawn).all():
        return Estimate(value, None, None, items)
    tail = NormalDist().cdf(-math.sqrt(items / (items - 1)) * t_quantile(0.975, items - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail]).tolist()
    return Estimate(value, min(low, value), max(high, value), items)


def resampled(
    items: Sequence[Any], statistic: Callable[[Sequence[Any]], float], resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Return the statistic of as many items drawn with replacement, again and again: float64 `[resamples]`.

    Equal numbers of items are drawn at equal places for one `seed`, so that two statistics with one seed are paired.

    Args:
        items: from which is drawn. statistic: makes one number of a list of items.
        resamples: how often is drawn.
    """
    draws = _draws(len(items), resamples, seed)
    return np.array([float(statistic([items[i] for i in draw])) for part in draws for draw in part.tolist()])


def paired_bootstrap(
    values: Sequence[Any],
    control: Sequence[Any],
    *,
    aggregate: Callable[[Sequence[Any]], float] | None = None,
    compare: Callable[[Any, Any], Any] = operator.sub,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Compare two lists of scores of the same items, with the 95 % interval from resampled items (Koehn 2004).

    What is hard for both cancels in a difference, so a small difference shows where two intervals would overlap.

    Args:
        values, control: one score per item, the same items in the same order.
        aggregate: makes one number of scores; None for the mean, which is much faster.
        compare: makes the comparison of the two numbers: `operator.sub` their difference, `operator.truediv` their
            ratio.
        resamples, seed: as in `resampled`.

    Raises:
        ValueError: different numbers of items, or none.
    """
    n = len(values)
    if n != len(control) or not n:
        raise ValueError(f"a paired comparison needs the same items for both, got {n} and {len(control)}")
    if aggregate is None:
        a, b = (np.asarray(scores, dtype=np.float64) for scores in (values, control))
        drawn = np.concatenate([compare(a[draw].mean(1), b[draw].mean(1)) for draw in _draws(n, resamples, seed)])
        return estimate(float(compare(a.mean(), b.mean())), drawn, n)
    drawn = compare(*(resampled(scores, aggregate, resamples, seed) for scores in (values, control)))
    return estimate(float(compare(aggregate(values), aggregate(control))), drawn, n)


def bootstrap(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Return the mean of `values` with its 95 % interval from resampled items.

    Args:
        resamples, seed: as in `resampled`.
    """
    a = np.asarray(values, dtype=np.float64)
    drawn = np.concatenate([a[draw].mean(1) for draw in _draws(len(a), resamples, seed)])
    return estimate(float(a.mean()), drawn, len(a))


def _draws(n: int, resamples: int, seed: int):
    """Yield the places that are drawn, int `[some, n]`, about a million at a time."""
    generator, rows = np.random.default_rng(seed), max(1, 1_000_000 // n)
    for done in range(0, resamples, rows):
        yield generator.integers(n, size=(min(rows, resamples - done), n))


def t_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t by Abramowitz and Stegun 26.7.5, for 4 or more degrees of freedom."""
    z, v = NormalDist().inv_cdf(probability), freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


@dataclass(frozen=True)
class Growth:
    """Hold the exponent of `seconds ~ n^exponent` with its 95 % interval.

    Attributes:
        low, high: the interval; None for fewer than `MIN_ROUNDS` runs of a length.
        lengths: on how many different lengths the exponent rests.

    Raises:
        ValueError: fewer than `MIN_LENGTHS` lengths, or bounds that do not enclose the exponent.
    """

    exponent: float
    low: float | None
    high: float | None
    lengths: int

    def __post_init__(self) -> None:
        if self.lengths < MIN_LENGTHS:
            raise ValueError(f"an exponent of {MIN_LENGTHS} lengths or more")
        bounds = [bound for bound in (self.low, self.exponent, self.high) if bound is not None]
        if len(bounds) == 2 or bounds != sorted(bounds) or not all(map(math.isfinite, bounds)):
            raise ValueError("low <= exponent <= high, or no bounds")

    def __str__(self) -> str:
        bounds = "" if self.low is None else f" ({self.low:.2f} to {self.high:.2f})"
        return f"{self.exponent:.2f}{bounds}"


def growth(lengths: Sequence[int], seconds: Sequence[float]) -> Growth | None:
    """Fit log seconds to log length by least squares, over every run; None for fewer than `MIN_LENGTHS` lengths.

    The interval is that of the regression (Student's t, n - 2 degrees of freedom). The interval holds for a straight
    line: where linear work still hides the quadratic, the exponent is that of the range measured, not of large n.

    Args:
        lengths, seconds: the length and the time of every run, in the same order.

    Raises:
        ValueError: different numbers of lengths and times, or a value that is not above 0.
    """
    if len(lengths) != len(seconds) or any(x <= 0 for x in (*lengths, *seconds)):
        raise ValueError(f"got {len(lengths)} lengths and {len(seconds)} times; expected as many, all above 0")
    different, n = len(set(lengths)), len(lengths)
    if different < MIN_LENGTHS:
        return None
    x, y = np.log(np.asarray(lengths, dtype=np.float64)), np.log(np.asarray(seconds, dtype=np.float64))
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    if min(lengths.count(length) for length in set(lengths)) < MIN_ROUNDS:
        return Growth(slope, None, None, different)
    rest = y - slope * x
    half = t_quantile(0.975, n - 2) * math.sqrt(float(rest @ rest) / (n - 2) / float(x @ x))
    return Growth(slope, slope - half, slope + half, different)


def crossover(speedups: Sequence[tuple[int, float]], interpolated: bool = True) -> float | None:
    """Return the length from which on a candidate is faster than its control, up to the longest one.

    Args:
        speedups: lengths, ascending, with how many times as fast the candidate is there.
        interpolated: between the two lengths around the crossing, in log-log; else the longer of the two.

    Returns:
        The shortest length where the candidate is faster everywhere; None where it is not faster at the longest.
    """
    slower = [index for index, (_, speedup) in enumerate(speedups) if speedup <= 1]
    if not slower:
        return speedups[0][0] if speedups else None
    if slower[-1] == len(speedups) - 1:
        return None
    (n, low), (m, high) = speedups[slower[-1]], speedups[slower[-1] + 1]
    return n * (m / n) ** (-math.log(low) / (math.log(high) - math.log(low))) if interpolated else m


@dataclass(frozen=True)
class Spread:
    """Hold the median of repeated measurements with low and high: their extremes (`of`) or quartiles (`quartiles`).

    Raises:
        ValueError: values that are not finite, positive and ascending, or no runs.
    """

    median: float
    low: float
    high: float
    runs: int

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.median <= self.high < math.inf and self.runs > 0):
            raise ValueError("0 < low <= median <= high, finite, over 1 run or more")

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the median of `values` with their extremes as low and high."""
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1], len(values))

    @classmethod
    def quartiles(cls, values: Sequence[float]) -> "Spread":
        """Return the median of `values` with their quartiles as low and high.

        One call that something else disturbed does not widen this spread.
        """
        values = list(values)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, low, high, len(values))

    @property
    def enough(self) -> bool:
        """Return whether there are at least `MIN_ROUNDS` runs, enough to speak of their spread."""
        return self.runs >= MIN_ROUNDS

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return dict(vars(self))

    def __str__(self) -> str:
        bounds = f" ({self.low:.3g} to {self.high:.3g})" if self.enough else ""
        return f"{self.median:.3g}{bounds}"
