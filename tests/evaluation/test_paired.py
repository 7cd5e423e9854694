"""The paired bootstrap: against hand-made data, the t distribution, and its promise of 95 %."""

import math

import pytest
import torch

from hf_attnswap.evaluation.paired import FEW, VERDICTS, paired_bootstrap
from hf_attnswap.statistics import t_quantile


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (7, 2.36462), (29, 2.04523), (499, 1.96474)]
)
def test_t_quantile_is_that_of_the_tables(freedom, expected):
    assert t_quantile(0.975, freedom) == pytest.approx(expected, rel=0.01 if freedom == 3 else 2e-4)


def test_a_constant_difference_has_no_spread():
    found = paired_bootstrap([1.5, 3.5, 0.5], [1.0, 3.0, 0.0])
    assert (found.value, found.low, found.high, found.items) == pytest.approx((0.5, 0.5, 0.5, 3))


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


def test_one_item_says_nothing():
    found = paired_bootstrap([3.0], [1.0])
    assert found.value == 2 and math.isnan(found.low) and found.verdict() == "no measurable difference"


def test_few_items_are_marked():
    assert paired_bootstrap([0.0] * (FEW - 1), [1.0] * (FEW - 1), resamples=10).few
    assert not paired_bootstrap([0.0] * FEW, [1.0] * FEW, resamples=10).few


@pytest.mark.parametrize(("ours", "control"), [([1.0], [1.0, 2.0]), ([], [])])
def test_other_items_are_refused(ours, control):
    with pytest.raises(ValueError, match=f"the same items for both, got {len(ours)} and {len(control)}"):
        paired_bootstrap(ours, control)
