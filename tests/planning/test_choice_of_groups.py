"""Budgets in words, what a plan has to beat, how many groups are kept, and the search, without a model."""

import pytest
import torch

from hf_attnswap import UsageError
from hf_attnswap.planning.budgets import Budget, parse_budgets
from hf_attnswap.planning.choosing import fewest_groups, most_groups
from hf_attnswap.planning.controls import best_groups, best_layers, every_nth_layer, random_groups
from hf_attnswap.planning.search import ALIKE, GATE, HIGH, LOW, advance, new_search, order

LAYERS = {layer: [3 * layer, 3 * layer + 1, 3 * layer + 2] for layer in range(30)}


@pytest.mark.parametrize(
    ("text", "what", "bound", "length"),
    [
        ("groups=1/4", "groups", 0.25, 0),
        ("groups=22", "groups", 22, 0),
        ("ppl<=1.02", "ppl", 1.02, 0),
        ("cache<=0.3", "cache", 0.3, 8192),
        ("cache <= 3/10 at 2048", "cache", 0.3, 2048),
        ("prefill>=1.5 at 8192", "prefill", 1.5, 8192),
    ],
)
def test_a_budget_is_read(text, what, bound, length):
    budget = Budget.parse(text)
    assert (budget.what, budget.bound, budget.length) == (what, bound, length)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("speed>=2", "budget is 'speed>=2'; expected 'groups=1/4'"),
        ("groups", "expected 'groups=1/4'"),
        ("groups<=4", "expected groups="),
        ("ppl>=1.02", "expected ppl<="),
        ("ppl<=0.9", "softmax itself is at 1"),
        ("cache<=1", "softmax itself is at 1"),
        ("groups=1/0", "'1/0' is no number"),
        ("groups=2.5", "a whole number of groups"),
        ("groups=0", "numbers above 0"),
        ("prefill>=1.5 at 0", "numbers above 0"),
        ("ppl<=1.02 at 512", "only cache and prefill take a length"),
    ],
)
def test_what_is_no_budget_is_refused_in_one_line(text, says):
    with pytest.raises(UsageError) as refused:
        Budget.parse(text)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_miss_is_said_in_words():
    budget = Budget.parse("ppl<=1.02")
    assert budget.met(1.02) and not budget.met(1.05)
    assert budget.misses(1.05) == "perplexity 1.05, which misses 'ppl<=1.02' by 0.03"
    assert Budget.parse("prefill>=1.5 at 64").misses(1.2) == (
        "speed of prefill at 64 1.2, which misses 'prefill>=1.5 at 64' by 0.3"
    )


def test_budgets_come_together_and_each_once():
    assert [b.what for b in parse_budgets(["groups=1/4, ppl<=1.05", "cache<=0.3"])] == ["groups", "ppl", "cache"]
    with pytest.raises(UsageError, match="there is one for ppl already"):
        parse_budgets(["ppl<=1.02", "ppl<=1.05"])
    with pytest.raises(UsageError, match="needs a budget"):
        parse_budgets([])


@pytest.mark.parametrize(("text", "count"), [("groups=1/4", 22), ("groups=0.1", 9), ("groups=1", 1)])
def test_a_share_of_the_groups_is_a_number(text, count):
    assert Budget.parse(text).count(90) == count


@pytest.mark.parametrize("text", ["groups=90", "groups=1/100"])
def test_a_plan_keeps_neither_all_nor_nothing(text):
    with pytest.raises(UsageError, match="expected 1 to 89"):
        Budget.parse(text).count(90)


@pytest.mark.parametrize("count", [1, 9, 22, 45, 89])
def test_what_a_plan_has_to_beat_keeps_as_many_groups(count):
    scores = torch.rand(90, generator=torch.Generator().manual_seed(0)).tolist()
    for kept in (
        every_nth_layer(LAYERS, count),
        best_layers(LAYERS, scores, count),
        best_groups(scores, count),
        random_groups(90, count, 3),
    ):
        assert len(kept) == len(set(kept)) == count
        assert set(kept) <= set(range(90))


def test_every_nth_layer_is_spread_evenly():
    assert every_nth_layer(LAYERS, 21) == sorted(p for layer in (4, 8, 12, 17, 21, 25, 29) for p in LAYERS[layer])
    assert every_nth_layer(LAYERS, 45) == sorted(p for layer in range(1, 30, 2) for p in LAYERS[layer])


def test_best_layers_go_by_their_mean():
    scores = [1.0, 0.0, 0.0, *[0.5] * 6]
    layers = {0: [0, 1, 2], 1: [3, 4, 5], 2: [6, 7, 8]}
    assert best_layers(layers, scores, 6) == [3, 4, 5, 6, 7, 8]
    assert best_layers(layers, scores, 7) == [0, 3, 4, 5, 6, 7, 8]  # of the last layer its best group


def test_as_many_groups_as_the_costs_allow():
    def cost(budget, kept):
        return len(kept) / 10 if budget.what == "cache" else 2 - len(kept) / 10

    everything = list(range(10))
    of = lambda *texts: most_groups(parse_budgets(texts), everything, cost)  # noqa: E731
    assert of("groups=1/2") == 5
    assert of("cache<=0.3") == 3
    assert of("prefill>=1.6") == 4
    assert of("groups=1/2", "cache<=0.3", "prefill>=1.6") == 3
    assert of("cache<=0.01") == 1  # the nearest
    assert of("ppl<=1.02") == 9


@pytest.mark.parametrize("needed", range(1, 12))
def test_as_few_groups_as_the_perplexity_needs(needed):
    asked = []
    found = fewest_groups(9, lambda count: asked.append(count) or count >= needed)
    assert found == min(needed, 9)
    assert len(asked) <= 4


def searched(loss, total, count, steps):
    """The search on a loss of gates alone."""

    def gradient(kind, gates):
        gates = gates.requires_grad_()
        lost = loss(gates)
        return lost.item(), torch.autograd.grad(lost, gates)[0]

    search = new_search(total)
    for _ in range(steps):
        search = advance(search, count, gradient)
    return search


def test_scores_rank_groups_that_do_not_know_one_another():
    weights = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3, 0.7], dtype=torch.float64)
    search = searched(lambda gates: (weights * (1 - gates)).sum(), 6, 2, ALIKE - 1)
    assert search["gates"] == [GATE] * 6
    assert best_groups(search["scores"], 2) == [3, 5]
    assert order(search)[:2] == [3, 5]
    search = searched(lambda gates: (weights * (1 - gates)).sum(), 6, 2, ALIKE)
    assert search["gates"] == [LOW, LOW, LOW, HIGH, LOW, HIGH]


def test_the_search_keeps_one_of_two_groups_that_do_the_same():
    def loss(gates):
        same = (1 - gates[0]) * (1 - gates[1])  # either is enough
        return 2 * same**2 + 0.8 * (1 - gates[2]) ** 2 + 0.1 * (1 - gates[3]) ** 2 - 0.01 * gates[0]

    scored = searched(loss, 4, 2, ALIKE)
    assert best_groups(scored["scores"], 2) == [0, 1]
    found = searched(loss, 4, 2, ALIKE + 40)
    assert set(order(found)[:2]) in ({0, 2}, {1, 2})
