"""How time grows with the length: the exponent of n with its interval, and where one curve crosses another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..statistics import t_quantile


@dataclass(frozen=True)
class Growth:
    """`seconds ~ n^exponent`; low and high are its 95 % interval. lengths: how many different ones it rests on."""

    exponent: float
    low: float
    high: float
    lengths: int


def growth(lengths: Sequence[int], seconds: Sequence[float]) -> Growth | None:
    """Least squares of log seconds on log length, over every run; None for fewer than two lengths or three runs.

    The interval is that of the regression (Student's t, n - 2 degrees of freedom). It holds for a straight line: where
    linear work still hides the quadratic, the exponent is that of the range measured, not of large n.

    Raises:
        ValueError: different numbers of lengths and times, or a value that is not above 0.
    """
    if len(lengths) != len(seconds) or any(x <= 0 for x in (*lengths, *seconds)):
        raise ValueError(f"got {len(lengths)} lengths and {len(seconds)} times; expected as many, all above 0")
    different, n = len(set(lengths)), len(lengths)
    if different < 2 or n < 3:
        return None
    x, y = [math.log(v) for v in lengths], [math.log(v) for v in seconds]
    mean_x, mean_y = math.fsum(x) / n, math.fsum(y) / n
    spread = math.fsum((v - mean_x) ** 2 for v in x)
    slope = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = math.fsum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    half = t_quantile(0.975, n - 2) * math.sqrt(rest / (n - 2) / spread)
    return Growth(slope, slope - half, slope + half, different)


def crossover(points: Sequence[tuple[int, float]]) -> float | None:
    """The length from which on a candidate is faster than its control, between lengths by log-log interpolation.

    Args:
        points: lengths, ascending, with the speed-up there.

    Returns:
        The shortest length where it is faster at all; None where it is slower at the longest.
    """
    slower = [index for index, (_, ratio) in enumerate(points) if ratio < 1]
    if not slower:
        return points[0][0] if points else None
    if slower[-1] == len(points) - 1:
        return None
    (n, low), (m, high) = points[slower[-1]], points[slower[-1] + 1]
    return n * (m / n) ** (-math.log(low) / (math.log(high) - math.log(low)))
