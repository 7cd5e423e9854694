"""The bootstrap: against hand-made data, the t distribution, and its promise of 95 %."""

import math
import operator

import pytest
import torch

from hf_attnswap.statistics import (
    FEW,
    MIN_ITEMS,
    VERDICTS,
    Spread,
    bootstrap,
    estimate,
    lacking,
    paired_bootstrap,
    resampled,
    t_quantile,
)


@pytest.mark.parametrize(("freedom", "expected"), [(4, 2.77645), (7, 2.36462), (29, 2.04523), (499, 1.96474)])
def test_t_quantile_is_that_of_the_tables(freedom, expected):
    assert t_quantile(0.975, freedom) == pytest.approx(expected, rel=2e-3 if freedom == 4 else 2e-4)


def test_a_constant_difference_has_no_spread():
    found = paired_bootstrap([1.5, 3.5, 0.5, 2.5] * 2, [1.0, 3.0, 0.0, 2.0] * 2)
    assert (found.value, found.low, found.high, found.items) == pytest.approx((0.5, 0.5, 0.5, 8))


def test_what_both_find_hard_cancels():
    hard = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double() * 100
    found = paired_bootstrap((hard + 0.1).tolist(), hard.tolist())
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)
    assert found.verdict() == "better" and found.verdict(lower_is_better=True) == "worse"


def test_of_many_items_it_is_the_normal_interval():
    x = torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = paired_bootstrap(x.tolist(), [0.0] * 2000)
    error = 1.96 * x.std().item() / math.sqrt(2000)
    assert found.low == pytest.approx(x.mean().item() - error, abs=0.15 * error)
    assert found.high == pytest.approx(x.mean().item() + error, abs=0.15 * error)


def test_of_few_items_it_holds_what_it_says():
    generator = torch.Generator().manual_seed(2)
    held = 0
    for trial in range(200):
        x = torch.randn(8, dtype=torch.float64, generator=generator)
        found = paired_bootstrap(x.tolist(), [0.0] * 8, resamples=1000, seed=trial)
        held += found.low <= 0 <= found.high
    assert 0.91 <= held / 200 <= 0.985  # a plain percentile interval holds 0.88 here


@pytest.mark.parametrize(
    ("shift", "lower", "verdict"),
    [(2.0, False, 0), (2.0, True, 2), (-2.0, False, 2), (-2.0, True, 0), (0.01, False, 1), (0.01, True, 1)],
)
def test_the_verdict_comes_from_the_interval(shift, lower, verdict):
    x = torch.randn(50, generator=torch.Generator().manual_seed(3)).double()
    found = paired_bootstrap((x - x.mean() + shift).tolist(), [0.0] * 50)
    assert found.verdict(lower_is_better=lower) == VERDICTS[verdict]


@pytest.mark.parametrize("items", (1, 2, MIN_ITEMS - 1))
def test_few_items_give_no_interval_and_no_verdict(items):
    found = paired_bootstrap([3.0 + i for i in range(items)], [1.0] * items)
    assert found.value > 1 and found.low is None and found.high is None and found.verdict() is None
    assert paired_bootstrap([3.0 + i for i in range(MIN_ITEMS)], [1.0] * MIN_ITEMS).verdict() == "better"


def test_what_is_missing_is_said():
    assert lacking("an interval", 8, "blocks", 4) == "an interval needs 8 blocks, there are 4"
    assert lacking("a range", 3, "rounds", 1) == "a range needs 3 rounds, there is 1"


def test_resamples_of_one_seed_are_paired():
    """What is kept of every arm by itself gives the interval of their difference."""
    draw = torch.Generator().manual_seed(4)
    a, b = (torch.randn(40, generator=draw).tolist() for _ in range(2))

    def mean(some):
        return sum(some) / len(some)

    kept = [resampled(x, mean, 1000, seed=3) for x in (a, b)]
    together = paired_bootstrap(a, b, resamples=1000, seed=3)
    apart = estimate(mean(a) - mean(b), kept[0] - kept[1], 40)
    assert (apart.low, apart.high) == pytest.approx((together.low, together.high))
    slow = paired_bootstrap(a, b, aggregate=mean, resamples=1000, seed=3)
    assert (slow.value, slow.low, slow.high) == pytest.approx((together.value, together.low, together.high))


def test_a_ratio_and_a_mean():
    control = [1.0, 0.0, 1.0, 1.0] * 10
    ratio = paired_bootstrap([x / 2 for x in control], control, compare=operator.truediv)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    mean = bootstrap(control)
    assert mean.value == 0.75 and mean.high - mean.low == pytest.approx(2 * 2.02 * 0.433 / 40**0.5, rel=0.15)


def test_a_resample_that_is_not_finite_gives_no_interval():
    assert estimate(1.0, [0.5, math.inf, 1.5], 40).low is None
    assert estimate(math.inf, [0.5, 1.5], 40).low is None


def test_a_spread_is_said_from_three_rounds_on():
    assert str(Spread.of([1.0, 2.0])) == "1.5" and str(Spread.of([1.0, 2.0, 3.0])) == "2 (1 to 3)"
    with pytest.raises(ValueError, match="0 < low <= median <= high"):
        Spread(1.0, 1.5, 2.0, 3)


def test_few_items_are_marked():
    assert paired_bootstrap([0.0] * (FEW - 1), [1.0] * (FEW - 1), resamples=10).few
    assert not paired_bootstrap([0.0] * FEW, [1.0] * FEW, resamples=10).few


@pytest.mark.parametrize(("ours", "control"), [([1.0], [1.0, 2.0]), ([], [])])
def test_other_items_are_refused(ours, control):
    with pytest.raises(ValueError, match=f"the same items for both, got {len(ours)} and {len(control)}"):
        paired_bootstrap(ours, control)
