"""The arms that a plan is shown with: the plan, what it has to beat, and other numbers of groups."""

from collections.abc import Sequence
from dataclasses import dataclass

from .controls import SEEDS, best_groups, best_layers, every_nth_layer, random_groups
from .groups import Groups

PLAN, EVERY = "plan", "every n-th layer"


@dataclass(frozen=True)
class Wanted:
    """Name one choice of groups that is to be measured.

    Attributes:
        name: of the arm, once in a run. kept: places of the groups.
        rival: name of the plan with as many groups; None for plans, and where there is none.
    """

    name: str
    kept: tuple[int, ...]
    rival: str | None = None


def wanted_arms(groups: Groups, order: Sequence[int], scores: Sequence[float], count: int) -> list[Wanted]:
    """Return the arms: the plan of `count` groups first, then its rivals, half and twice as many groups, and none.

    Args:
        order: all groups, those first that the plan keeps first.
        scores: of each group by its gate gradient.
    """
    layers, total = groups.by_layer(), len(groups)
    found = [
        Wanted(PLAN, tuple(order[:count])),
        Wanted("best by gate gradient", tuple(best_groups(scores, count)), PLAN),
        Wanted("best layers", tuple(best_layers(layers, scores, count)), PLAN),
        Wanted(EVERY, tuple(every_nth_layer(layers, count)), PLAN),
    ]
    found += [Wanted(f"random groups {seed}", tuple(random_groups(total, count, seed)), PLAN) for seed in range(SEEDS)]
    for other in (count // 2, 2 * count):
        if 1 <= other < total:
            name = f"{PLAN} of {other}"
            found += [
                Wanted(name, tuple(order[:other])),
                Wanted(f"{EVERY} of {other}", tuple(every_nth_layer(layers, other)), name),
            ]
    return [*found, Wanted("all swapped", ())]
