"""Write numbers and strings as every rendering shows them."""

from collections.abc import Sequence

from ..statistics import Spread
from .types import Comparison


def plain(value: object) -> str:
    """Return `value` on one line, without control characters (an error message may hold escape sequences)."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def number(value: float) -> str:
    """Return `value` with three or four significant digits: 1.106, 29.31, 111.2, 7,123, 1.1e12."""
    size = abs(value)
    if size >= 99_999.5 or 0 < size < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3}f}"


def count(value: int) -> str:
    """Return a whole number with its thousands separated."""
    return f"{value:,}"


def times(value: float) -> str:
    """Return a ratio or a speed-up as ×1.106."""
    return f"×{number(value)}"


def interval(value: Comparison | Spread) -> str:
    """Return a ratio or speed-up with its bounds: ×1.106 (1.090–1.123), and a * where it comes from few items.

    Without bounds where the items or runs are too few for any.
    """
    if isinstance(value, Spread):
        middle, bounded, few = value.median, value.enough, ""
    else:
        middle, bounded, few = value.value, value.low is not None, "*" if value.few else ""
    return f"{times(middle)} ({number(value.low)}–{number(value.high)}){few}" if bounded else times(middle)


def signed(value: float) -> str:
    """Return a difference with its sign."""
    return f"{'+' if value > 0 else ''}{number(value)}"


def difference(value: Comparison) -> str:
    """Return a difference with its bounds: -0.700 (-0.800 to -0.600), and a * where it comes from few items."""
    if value.low is None or value.high is None:
        return signed(value.value)
    few = "*" if value.few else ""
    return f"{signed(value.value)} ({signed(value.low)} to {signed(value.high)}){few}"


def seconds(value: float) -> str:
    """Return a duration in seconds, or in milliseconds below one second."""
    return f"{number(value)} s" if value >= 1 else f"{number(value * 1000)} ms"


def listing(items: Sequence[str]) -> str:
    """Return the items as prose: a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
