"""The exponent of growth against curves whose exponent is known and against the textbook regression; crossings."""

import math
import random

import pytest

from hf_attnswap.statistics import crossover, growth

LENGTHS = [256, 512, 1024, 2048, 4096]


@pytest.mark.parametrize("exponent", (0.0, 1.0, 2.0))
def test_a_pure_power_is_found_exactly(exponent):
    lengths = LENGTHS * 3
    found = growth(lengths, [3e-6 * n**exponent for n in lengths])
    assert (found.exponent, found.low, found.high) == pytest.approx((exponent,) * 3, abs=1e-9) and found.lengths == 5


def test_a_regression_by_hand():
    # log2 of lengths 0, 1, 2 and of times 0, 2, 1, thrice: slope 1/2, rest 9/2, error sqrt(9/2 / 7 / 6), t 2.36462.
    found = growth([1, 2, 4] * 3, [1.0, 4.0, 2.0] * 3)
    assert found.exponent == pytest.approx(0.5)
    assert found.high - 0.5 == pytest.approx(2.36462 * math.sqrt(4.5 / 7 / 6), rel=2e-4)


def test_beside_the_regression_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    draw = random.Random(1)
    lengths = [n for n in LENGTHS for _ in range(3)]
    times = [n**1.7 * math.exp(draw.gauss(0, 0.2)) for n in lengths]
    found, expected = (
        growth(lengths, times),
        stats.linregress([math.log(n) for n in lengths], list(map(math.log, times))),
    )
    half = stats.t.ppf(0.975, len(lengths) - 2) * expected.stderr
    assert found.exponent == pytest.approx(expected.slope)
    assert (found.low, found.high) == pytest.approx((expected.slope - half, expected.slope + half), rel=1e-4)


def test_the_interval_holds_what_it_says():
    draw, held = random.Random(0), 0
    for _ in range(300):
        times = [n**1.5 * math.exp(draw.gauss(0, 0.1)) for n in LENGTHS * 3]
        found = growth(LENGTHS * 3, times)
        held += found.low <= 1.5 <= found.high
    assert 0.92 <= held / 300 <= 0.98


def test_linear_work_hides_the_quadratic():
    found = growth(LENGTHS, [1e-4 * n + 1e-9 * n**2 for n in LENGTHS])
    assert 1 < found.exponent < 1.1


@pytest.mark.parametrize("lengths", ([256, 256, 256], [256, 512] * 5))
def test_two_lengths_say_nothing(lengths):
    assert growth(lengths, [1.0 + i for i in range(len(lengths))]) is None


def test_fewer_than_three_rounds_give_no_interval():
    found = growth([256, 512, 1024] * 2, [1.0, 2.1, 3.9, 1.1, 2.0, 4.0])
    assert found.exponent == pytest.approx(1, abs=0.1) and found.low is None and found.high is None
    assert str(found) == f"{found.exponent:.2f}"
    again = growth([256, 512, 1024] * 3, [1.0, 2.1, 3.9, 1.1, 2.0, 4.0, 1.0, 2.0, 4.0])
    assert again.low < again.exponent < again.high and str(again).endswith(f"to {again.high:.2f})")


def test_what_has_no_logarithm_is_refused():
    with pytest.raises(ValueError, match="expected as many, all above 0"):
        growth([1, 2, 3], [1.0, 0.0, 1.0])


def test_crossover_is_between_the_lengths_where_it_becomes_faster():
    assert crossover([(128, 0.5), (256, 2.0), (512, 4.0)]) == pytest.approx(181.02, rel=1e-3)
    assert crossover([(128, 1.5), (256, 0.9), (512, 1.1)]) > 256
    assert crossover([(128, 1.5), (256, 3.0)]) == 128
    assert crossover([(128, 1.5), (256, 0.9)]) is None
    assert crossover([(128, 0.5), (256, 1.0), (512, 4.0)]) == 256
    assert crossover([]) is None


def test_crossover_at_a_length_that_was_measured():
    assert crossover([(128, 0.5), (256, 2.0), (512, 4.0)], interpolated=False) == 256
    assert crossover([(128, 0.5), (256, 2.0), (512, 0.9)], interpolated=False) is None
