"""What a plan has to beat, at equal numbers of kept groups: the ways in which others choose what keeps softmax."""

import random
from collections.abc import Mapping, Sequence

SEEDS = 5  # of random groups


def every_nth_layer(layers: Mapping[int, Sequence[int]], count: int) -> list[int]:
    """Return the places of `count` groups in layers that are spread evenly; the last of them may keep some alone.

    Args:
        layers: for each layer the places of its groups, in order.
    """
    order = list(layers.values())
    per_layer = sum(map(len, order)) / len(order)
    wanted = max(1, round(count / per_layer))
    step = len(order) / wanted
    spread = [int((number + 1) * step - 1e-9) for number in range(wanted)]
    spread += [index for index in range(len(order)) if index not in spread]
    return _filled([order[index] for index in spread], count)


def best_layers(layers: Mapping[int, Sequence[int]], scores: Sequence[float], count: int) -> list[int]:
    """Return the places of `count` groups in the layers with the largest mean score, the last one by its best groups.

    Args:
        layers: as in `every_nth_layer`.
        scores: one per place, more is better.
    """

    def mean(places: Sequence[int]) -> float:
        return sum(scores[place] for place in places) / len(places)

    ranked = sorted(layers.values(), key=mean, reverse=True)
    return _filled([sorted(places, key=lambda place: -scores[place]) for places in ranked], count)


def random_groups(total: int, count: int, seed: int) -> list[int]:
    """Return `count` of the places 0 to `total - 1`, drawn at random."""
    return sorted(random.Random(seed).sample(range(total), count))


def best_groups(scores: Sequence[float], count: int) -> list[int]:
    """Return the `count` places with the largest score."""
    return sorted(sorted(range(len(scores)), key=lambda place: -scores[place])[:count])


def _filled(layers: Sequence[Sequence[int]], count: int) -> list[int]:
    return sorted([place for places in layers for place in places][:count])
