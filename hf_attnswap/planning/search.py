"""Search for the groups to keep: scores by gate gradients, then exchanges by what each group is worth in the plan.

Scores: all gates stand at 0.3, and the gradient of the loss by each says what the model gains by softmax there, on
plain texts and on texts that are written twice (`gates` says what a gate is).

Search: the gates of the groups that are kept stand high, those of all others low, and each step takes the gradient on
one text. So a group is scored beside the others that are kept, and what two groups do for one another counts once.
What a group is worth is its gradient halfway between kept and not, which is the whole difference where the loss is a
parabola of its gate: near the teacher it is one of `1 - g`, so the gradient is scaled by that. After each step the plan
keeps the groups that are worth most by the mean over the latest texts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .controls import best_groups

KINDS = ("plain", "twice")  # of texts, which take turns
ALIKE, GATE = 8, 0.3  # first steps, in which all gates stay at this
HIGH, LOW = 0.6, 0.15  # gates of the groups that the search keeps for now, and of all others
LAST = 0.15  # the least weight of a new gradient in the mean of those of its kind, which is else 1 / number


def new_search(total: int) -> dict[str, Any]:
    """Return a search of `total` groups that has not begun, as JSON.

    That is `step`; `gates`; by kind of text, `gains` and their `number`; `scores`, those at equal gates once they are
    there; and `losses`, the kind and the loss of each step.
    """
    return {
        "step": 0,
        "gates": [GATE] * total,
        "gains": {kind: [0.0] * total for kind in KINDS},
        "number": dict.fromkeys(KINDS, 0),
        "scores": None,
        "losses": [],
    }


def advance(
    search: Mapping[str, Any],
    count: int,
    gradient: Callable[[str, Tensor], tuple[float, Tensor]],
    kinds: Sequence[str] = KINDS,
) -> dict[str, Any]:
    """Return the search after one more step.

    Args:
        search: what `new_search` or this function returned.
        count: how many groups are kept.
        gradient: of a kind of text and the gates, float64 `[n]`, the loss there and its gradient by the gates `[n]`.
        kinds: the kinds of texts that take turns, of `KINDS`.
    """
    step, gates = search["step"] + 1, torch.tensor(search["gates"], dtype=torch.float64)
    kind = kinds[search["step"] % len(kinds)]
    loss, found = gradient(kind, gates)
    worth = -found.detach() / (2 * (1 - gates.detach()))
    number = {**search["number"], kind: search["number"][kind] + 1}
    weight = max(1 / number[kind], LAST)
    mean = torch.lerp(torch.tensor(search["gains"][kind], dtype=torch.float64), worth, weight)
    gains = {**search["gains"], kind: mean.tolist()}
    if step >= ALIKE:
        gates = torch.full_like(gates, LOW)
        gates[best_groups(scores(gains), count)] = HIGH
    return {
        "step": step,
        "gates": gates.tolist(),
        "gains": gains,
        "number": number,
        "scores": scores(gains) if step <= ALIKE else search["scores"],
        "losses": [*search["losses"], [kind, loss]],
    }


def scores(gains: Mapping[str, Sequence[float]]) -> list[float]:
    """Return one score per group: the gains on each kind of text over the sum of their magnitudes, added up."""
    total = torch.zeros(len(next(iter(gains.values()))), dtype=torch.float64)
    for of_kind in gains.values():
        values = torch.tensor(of_kind, dtype=torch.float64)
        total += values / values.abs().sum().clamp(min=1e-300)
    return total.tolist()


def order(search: Mapping[str, Any]) -> list[int]:
    """Return all groups, those first that are worth most."""
    worth = scores(search["gains"])
    return sorted(range(len(worth)), key=lambda place: -worth[place])
