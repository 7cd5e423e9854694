"""Budgets in words: "groups=1/4", "ppl<=1.02", "cache<=0.3", "cache<=0.3 at 8192", "prefill>=1.5 at 8192"."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..errors import UsageError, shown

EXAMPLES = "'groups=1/4', 'ppl<=1.02', 'cache<=0.3 at 8192' or 'prefill>=1.5 at 8192'"
_SIGNS = {"groups": "=", "ppl": "<=", "cache": "<=", "prefill": ">="}
_WORDS = {
    "groups": "groups that keep softmax",
    "ppl": "perplexity",
    "cache": "cache",
    "prefill": "speed of prefill",
}
LENGTH = 8192  # tokens, where a budget of cache or prefill names none


@dataclass(frozen=True)
class Budget:
    """Hold one bound on a plan, all but the first over softmax.

    Attributes:
        what: "groups" (a number of groups, or below 1 a share of them), "ppl", "cache" or "prefill".
        bound: the bound; the sign is that of `what`.
        length: tokens at which it holds, for "cache" and "prefill"; 0 for the others.
        text: what the user wrote.
    """

    what: str
    bound: float
    length: int
    text: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Return the budget that a text says.

        Raises:
            UsageError: an unknown word, sign or number, or a bound that says nothing.
        """
        found = re.fullmatch(r"\s*([a-z_]+)\s*(<=|>=|=)\s*([\d./e+-]+)\s*(?:at\s+(\d+))?\s*", str(text))
        if found is None or found[1] not in _SIGNS:
            raise UsageError(f"budget is {shown(text)}; expected {EXAMPLES}")
        what, sign, number, at = found.groups()
        if sign != _SIGNS[what]:
            raise UsageError(f"budget is {shown(text)}; expected {what}{_SIGNS[what]}")
        try:
            bound = float(Fraction(number))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise UsageError(f"budget is {shown(text)}: {number!r} is no number such as 1/4 or 0.25") from None
        if at is not None and what not in ("cache", "prefill"):
            raise UsageError(f"budget is {shown(text)}: only cache and prefill take a length")
        length = int(at or LENGTH) if what in ("cache", "prefill") else 0
        if bound <= 0 or (at is not None and length == 0):
            raise UsageError(f"budget is {shown(text)}; expected numbers above 0")
        if what == "groups" and bound > 1 and bound != int(bound):
            raise UsageError(f"budget is {shown(text)}; expected a whole number of groups, or a share below 1")
        if what == "ppl" and bound < 1:
            raise UsageError(f"budget is {shown(text)}: softmax itself is at 1, so expected ppl<=1 or more")
        if what == "cache" and bound >= 1:
            raise UsageError(f"budget is {shown(text)}: softmax itself is at 1, so expected a bound below 1")
        return cls(what, bound, length, str(text).strip())

    def met(self, value: float) -> bool:
        """Return whether a plan at `value` meets it; for groups, the number of groups that `count` gives."""
        return value >= self.bound if self.what == "prefill" else value <= self.bound

    def count(self, groups: int) -> int:
        """Return how many of `groups` groups a budget of groups lets keep softmax.

        Raises:
            UsageError: none, or all.
        """
        found = int(self.bound) if self.bound >= 1 else int(self.bound * groups + 1e-9)
        if not 1 <= found < groups:
            raise UsageError(
                f"budget {self.text!r} keeps {found} of the {groups} groups of the model; expected 1 to {groups - 1}"
            )
        return found

    def misses(self, value: float) -> str:
        """Return in words by how much a plan at `value` misses it."""
        at = f" at {self.length}" if self.length else ""
        off = abs(value - self.bound)
        return f"{_WORDS[self.what]}{at} {value:.4g}, which misses {self.text!r} by {off:.2g}"


def parse_budgets(texts: Sequence[str]) -> tuple[Budget, ...]:
    """Return the budgets that texts say, each a budget or several with commas between.

    Raises:
        UsageError: as `Budget.parse`; none at all, or two of one kind.
    """
    found = [Budget.parse(part) for text in texts for part in str(text).split(",")]
    if not found:
        raise UsageError(f"a plan needs a budget: {EXAMPLES}")
    for index, budget in enumerate(found):
        if any(budget.what == other.what and budget.length == other.length for other in found[:index]):
            raise UsageError(f"budget {budget.text!r}: there is one for {budget.what} already")
    return tuple(found)
