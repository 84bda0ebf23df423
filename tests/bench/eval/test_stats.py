"""Statistics against exact sums and scipy's figures, and power against simulated tables."""

import json
from fractions import Fraction
from math import comb, sqrt
from pathlib import Path

import numpy as np
import pytest

from bench.eval import stats

# 200 random tables and 200 random scores, with what scipy says of them.
SCIPY = json.loads(Path(__file__).with_name("scipy_tables.json").read_text())


def exact_p(lost: int, gained: int) -> Fraction:
    """Two-sided: the share of all sequences of lost + gained coins that are as unlikely or more."""
    n = lost + gained
    limit = comb(n, lost)
    return Fraction(sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= limit), 2**n)


def test_mcnemar_is_the_exact_sum_on_all_small_tables():
    for lost in range(30):
        for gained in range(30):
            assert stats.mcnemar(lost, gained) == pytest.approx(float(exact_p(lost, gained)))


def test_the_one_sided_test_is_the_exact_sum_of_one_tail():
    for lost in range(30):
        for gained in range(30):
            n = lost + gained
            tail = Fraction(sum(comb(n, k) for k in range(lost, n + 1)), 2**n)
            assert stats.mcnemar_loss(lost, gained) == pytest.approx(float(tail))


def test_mcnemar_of_a_large_table():
    assert stats.mcnemar(700, 600) == pytest.approx(float(exact_p(700, 600)), rel=1e-12)


def test_mcnemar_is_scipys_binomial_test_on_random_tables():
    for lost, gained, p in SCIPY["mcnemar"]:
        assert stats.mcnemar(lost, gained) == pytest.approx(p, rel=1e-9), (lost, gained)


def test_wilson_is_scipys_interval_of_random_scores():
    for correct, n, low, high in SCIPY["wilson"]:
        # At the ends scipy's has the last bits of a difference.
        assert stats.wilson(correct, n) == pytest.approx((low, high), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    ("correct", "n", "interval"),
    [(93, 100, (0.863, 0.966)), (53, 100, (0.433, 0.625)), (45, 50, (0.786, 0.957))],
)
def test_wilson_gives_known_intervals(correct, n, interval):
    assert stats.wilson(correct, n) == pytest.approx(interval, abs=5e-4)


def test_wilson_ends_are_where_the_score_test_just_rejects():
    """By its definition: |share - p| is z standard errors of p."""
    for n in (1, 7, 40, 164, 1319):
        for correct in range(0, n + 1, max(1, n // 7)):
            for end in stats.wilson(correct, n):
                if 0 < end < 1:
                    away = abs(correct / n - end) / sqrt(end * (1 - end) / n)
                    assert away == pytest.approx(stats.Z_95, abs=1e-6)


def test_wilson_at_the_ends():
    assert stats.wilson(0, 20)[0] == 0.0
    assert stats.wilson(20, 20)[1] == 1.0
    assert stats.wilson(0, 0) is None
    with pytest.raises(ValueError, match=r"wilson: 3 of 2; must be in 0\.\.n"):
        stats.wilson(3, 2)


def simulated_power(n: int, loss: float, churn: float, tables: int = 20_000) -> float:
    rng = np.random.default_rng(7)
    draws = rng.multinomial(n, [loss + churn, churn, 1 - loss - 2 * churn], size=tables)
    found: dict[tuple[int, int], bool] = {}
    hits = 0
    for lost, gained, _ in draws.tolist():
        if (lost, gained) not in found:
            p = stats.mcnemar(lost, gained)
            found[lost, gained] = p <= stats.ALPHA and lost > gained
        hits += found[lost, gained]
    return hits / tables


@pytest.mark.parametrize("n", [100, 164, 400, 1319])
@pytest.mark.parametrize("loss", [0.03, 0.05, 0.10])
@pytest.mark.parametrize("churn", [0.005, 0.02])
def test_power_is_what_simulated_tables_show(n, loss, churn):
    # Four standard errors of 20,000 tables.
    assert stats.power(n, loss, churn) == pytest.approx(simulated_power(n, loss, churn), abs=0.0142)


def test_without_a_loss_the_test_is_wrong_as_seldom_as_it_says():
    for n in (50, 100, 1000):
        assert stats.power(n, 0.0, 0.05) <= stats.ALPHA / 2


def test_the_detectable_loss_is_the_smallest_of_its_grid():
    for n in (100, 164, 1319):
        loss = stats.detectable_loss(n)
        assert stats.power(n, loss) >= stats.POWER > stats.power(n, loss - stats.LOSS_STEP)


def test_few_items_see_no_loss():
    assert stats.detectable_loss(5) is None
    assert stats.detectable_loss(0) is None


def test_shares_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"power: n = 10, loss = 0\.9, churn = 0\.1"):
        stats.power(10, 0.9, 0.1)
