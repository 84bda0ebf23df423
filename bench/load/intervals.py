"""Medians and ratios with bootstrap intervals. Seeded: the same values give the same interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
# The interval of a median cannot be wider than the range of the values, which holds the true median
# with probability 1 - 2 / 2^n: 94 % for five, 75 % for three.
LEAST_FOR_INTERVAL = 5


@dataclass(frozen=True)
class Estimate:
    """A value over `num` repeats; low and high are None below LEAST_FOR_INTERVAL of them."""

    value: float
    low: float | None
    high: float | None
    num: int


def median(values: Sequence[float | None], seed: int = 0) -> Estimate | None:
    """Median of the measured values with the middle 95 % of resampled medians."""
    measured = np.array([v for v in values if v is not None], dtype=np.float64)
    if not measured.size:
        return None
    low = high = None
    if measured.size >= LEAST_FOR_INTERVAL:
        rng = np.random.default_rng(seed)
        picks = rng.integers(measured.size, size=(RESAMPLES, measured.size))
        low, high = _middle(np.median(measured[picks], axis=1))
    return Estimate(float(np.median(measured)), low, high, int(measured.size))


def ratio_of_medians(
    base: Sequence[float | None], head: Sequence[float | None], seed: int = 0
) -> Estimate | None:
    """Median of `head` over that of `base`; entry i of both are repeat i, and stay together.

    Pairs of which one is not measured are left out; None when none is left or a median is 0.

    Raises:
        ValueError: lengths that differ.
    """
    if len(base) != len(head):
        raise ValueError(f"ratio_of_medians: {len(base)} repeats and {len(head)}; must be equal")
    kept = [(a, b) for a, b in zip(base, head, strict=True) if a is not None and b is not None]
    if not kept:
        return None
    pairs = np.array(kept, dtype=np.float64).T  # (2, repeats)
    middle = np.median(pairs, axis=1)
    if middle[0] == 0:
        return None
    low = high = None
    count = pairs.shape[1]
    if count >= LEAST_FOR_INTERVAL:
        rng = np.random.default_rng(seed)
        drawn = np.median(pairs[:, rng.integers(count, size=(RESAMPLES, count))], axis=2)
        if (drawn[0] != 0).all():
            low, high = _middle(drawn[1] / drawn[0])
    return Estimate(float(middle[1] / middle[0]), low, high, count)


def _middle(values: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
