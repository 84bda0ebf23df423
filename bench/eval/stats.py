"""Intervals, paired tests and power for yes-or-no scores. Exact where that is affordable."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

Z_95 = 1.959963984540054
ALPHA = 0.05
POWER = 0.8
# Share of items that flip each way between two runs of equally good models, where no run tells.
DEFAULT_CHURN = 0.02
LOSS_STEP = 0.001


def wilson(correct: int, n: int) -> tuple[float, float] | None:
    """Wilson's 95 % score interval of a share; None of no items.

    Raises:
        ValueError: counts that are no counts.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"wilson: {correct} of {n}; must be in 0..n")
    if n == 0:
        return None
    share, z2 = correct / n, Z_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the formula gives 0 and 1 but for the last bits.
    low = 0.0 if correct == 0 else max(0.0, middle - half)
    return low, 1.0 if correct == n else min(1.0, middle + half)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p of McNemar's exact test: items that only one of two models got right.

    The binomial test of `lost` of lost + gained at one half; 1 where none differs.
    """
    n = lost + gained
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**n)


def mcnemar_loss(lost: int, gained: int) -> float:
    """One-sided p of McNemar's exact test: so many lost, or more, where both are as likely."""
    n = lost + gained
    return sum(math.comb(n, i) for i in range(gained + 1)) / 2**n


def power(n: int, loss: float, churn: float = DEFAULT_CHURN, alpha: float = ALPHA) -> float:
    """Probability that McNemar's exact test finds a loss.

    Args:
        n: items. loss: true share that is lost net. churn: share that is gained; loss + churn is
            lost. alpha: of the two-sided test.
    Raises:
        ValueError: shares that are no shares.
    """
    lost, gained = loss + churn, churn
    if n < 1 or loss < 0 or churn < 0 or lost + gained > 1:
        raise ValueError(
            f"power: n = {n}, loss = {loss}, churn = {churn}; loss + 2 churn must be in 0..1"
        )
    differ = lost + gained
    if differ == 0:
        return 0.0
    pairs = np.arange(n + 1)  # of which so many differ
    log_pairs = _log_binomial(n, differ)
    found = 0.0
    for m in pairs[log_pairs > -40]:
        least = _least_lost(int(m), alpha)
        if least is None:
            continue
        log_lost = _log_binomial(int(m), lost / differ)
        found += math.exp(log_pairs[m]) * float(np.exp(log_lost[least:]).sum())
    return min(1.0, found)


def detectable_loss(
    n: int, churn: float = DEFAULT_CHURN, alpha: float = ALPHA, wanted: float = POWER
) -> float | None:
    """The smallest loss, in steps of 0.1 points, that n items show with the wanted power.

    None where no loss can be seen.
    """
    if n < 1 or churn > 0.5:
        return None
    low, high = 0, int((1 - 2 * churn) / LOSS_STEP)
    if power(n, high * LOSS_STEP, churn, alpha) < wanted:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if power(n, middle * LOSS_STEP, churn, alpha) >= wanted:
            high = middle
        else:
            low = middle
    return round(high * LOSS_STEP, 3)


def _log_binomial(n: int, p: float) -> np.ndarray:
    """Log of the binomial probabilities, shape (n + 1,)."""
    logs = _log_factorials(1 << n.bit_length())[: n + 1]
    k = np.arange(n + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        heads = np.where(k == 0, 0.0, k * np.log(p))
        tails = np.where(k == n, 0.0, (n - k) * np.log1p(-p))
    return logs[n] - logs - logs[::-1] + heads + tails


@lru_cache(maxsize=4096)
def _log_factorials(n: int) -> np.ndarray:
    """Shape (n + 1,)."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


@lru_cache(maxsize=65536)
def _least_lost(pairs: int, alpha: float) -> int | None:
    """The least number lost, of so many that differ, that the test calls a loss."""
    tails = np.cumsum(np.exp(_log_binomial(pairs, 0.5)))
    most_gained = int(np.searchsorted(2 * tails[: pairs // 2 + 1], alpha, side="right")) - 1
    return pairs - most_gained if most_gained >= 0 else None
