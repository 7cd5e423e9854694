"""How many groups a plan keeps: as many as its budgets of cost allow, or as few as its budget of perplexity needs."""

from collections.abc import Callable, Sequence

from .budgets import Budget

Cost = Callable[[Budget, Sequence[int]], float]  # of a plan with these groups kept, for a budget of cost


def most_groups(budgets: Sequence[Budget], order: Sequence[int], cost: Cost) -> int:
    """Return the most groups that all budgets of groups, cache and prefill allow; 1 where they allow none.

    Args:
        order: all groups, those first that are kept first.
        cost: what a plan costs, which grows with the groups (and a speed falls).
    """
    most = len(order) - 1
    for budget in budgets:
        if budget.what == "groups":
            most = min(most, budget.count(len(order)))
        elif budget.what != "ppl":
            most = _last(range(1, most + 1), lambda count, b=budget: b.met(cost(b, order[:count])))
    return most


def fewest_groups(most: int, met: Callable[[int], bool]) -> int:
    """Return the fewest groups, up to `most`, with which a bound is met that more groups meet better; else `most`.

    Args:
        met: whether the bound is met with so many groups; called about log2(most) times.
    """
    low, high = 1, most  # below `low` it is not met
    while low < high:
        middle = (low + high) // 2
        if met(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _last(counts: range, met: Callable[[int], bool]) -> int:
    """Return the last of the counts that is met, where all before it are; the first one where none is."""
    low, high = counts[0], counts[-1]
    while low < high:
        middle = (low + high + 1) // 2
        if met(middle):
            low = middle
        else:
            high = middle - 1
    return low
