"""Numbers and strings as every rendering shows them."""

from collections.abc import Sequence


def plain(value: object) -> str:
    """`value` on one line, without control characters (an error message may hold escape sequences)."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def number(value: float) -> str:
    """`value` with three or four significant digits: 1.106, 29.31, 111.2, 7,123, 1.1e12."""
    size = abs(value)
    if size >= 99_999.5 or 0 < size < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3}f}"


def count(value: int) -> str:
    """A whole number with its thousands separated."""
    return f"{value:,}"


def times(value: float) -> str:
    """A ratio or a speed-up: ×1.106."""
    return f"×{number(value)}"


def interval(value: dict, middle: str) -> str:
    """`value[middle]` with its bounds: ×1.106 (1.090–1.123), and a * where they come from few items."""
    few = "*" if value.get("few") else ""
    return f"{times(value[middle])} ({number(value['low'])}–{number(value['high'])}){few}"


def seconds(value: float) -> str:
    """A duration in seconds, or in milliseconds below one second."""
    return f"{number(value)} s" if value >= 1 else f"{number(value * 1000)} ms"


def listing(items: Sequence[str]) -> str:
    """The items as prose: a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
