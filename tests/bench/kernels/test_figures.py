"""Medians, ratios and intervals of replay times."""

import random

import pytest

from bench.kernels import figures


def rounds(us: float, count: int = 40, spread: float = 0.02, seed: int = 0) -> list[float]:
    source = random.Random(seed)
    return [us * source.uniform(1 - spread, 1 + spread) for _ in range(count)]


def test_the_separators_time_is_taken_off_round_by_round():
    assert figures.per_layer([100.0, 120.0], [20.0, 30.0], 10) == [8.0, 9.0]
    assert figures.per_layer([100.0], None, 10) == [10.0]


def test_draws_count_the_same_however_many_rounds_they_have():
    assert figures.mean_of_medians([[1.0, 2.0, 3.0], [10.0]]) == 6.0


def test_a_speed_up_is_base_over_ours_with_an_interval_around_it():
    ratio = figures.speed_up([rounds(20.0), rounds(30.0)], [rounds(10.0, seed=1), rounds(15.0)])
    assert ratio.ratio == pytest.approx(2.0, rel=0.02)
    assert ratio.low <= ratio.ratio <= ratio.high
    assert ratio.high - ratio.low < 0.05


def test_the_interval_widens_with_the_spread():
    narrow, wide = (
        figures.speed_up([rounds(20.0, spread=s)], [rounds(10.0, spread=s, seed=1)])
        for s in (0.01, 0.3)
    )
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_what_slows_a_whole_round_does_not_widen_the_interval():
    slow = [1.0 if i % 2 else 1.5 for i in range(40)]
    ratio = figures.speed_up([[20 * s for s in slow]], [[10 * s for s in slow]])
    assert (ratio.low, ratio.high) == (2.0, 2.0)


def test_rounds_that_were_not_measured_together_are_refused():
    with pytest.raises(ValueError, match=r"speed_up: 3 rounds and 2"):
        figures.speed_up([[1.0, 1.0, 1.0]], [[1.0, 1.0]])


@pytest.mark.parametrize(
    ("ratio", "one"),
    [((1.001, 0.99, 1.01), True), ((1.01, 1.005, 1.015), True), ((1.05, 1.03, 1.07), False),
     ((1.5, 0.9, 2.1), True)],
)  # fmt: skip
def test_one_is_one_within_its_interval_or_the_tolerance(ratio, one):
    assert figures.is_one(figures.Ratio(*ratio)) is one


def test_rounds_are_settled_once_two_windows_agree():
    assert not figures.is_settled([10.0] * 9)
    assert figures.is_settled([10.0] * 10)
    assert not figures.is_settled([20.0] * 5 + [10.0] * 5)


def test_a_rate_is_in_gigabytes_per_second():
    assert figures.gb_s(38.9e6, 20.0) == pytest.approx(1945.0)
