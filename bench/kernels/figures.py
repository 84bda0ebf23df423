"""Figures from replay times: medians, rates, ratios and their intervals. Pure functions.

A round replays the graph of every arm once, so times of one round belong together. Each figure is
of one layer, in microseconds, and not measured is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

WINDOW = 5  # rounds
SETTLED = 0.01  # medians of two windows differ by less
RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Ratio:
    """How many times faster: base time over time, with a bootstrap interval over rounds."""

    ratio: float
    low: float
    high: float


def is_settled(rounds: Sequence[float]) -> bool:
    """Whether the last rounds take as long as those before them."""
    if len(rounds) < 2 * WINDOW:
        return False
    before, last = median(rounds[-2 * WINDOW : -WINDOW]), median(rounds[-WINDOW:])
    return abs(last - before) < SETTLED * before


def median(values: Sequence[float]) -> float:
    """Median, the mean of the middle two."""
    return quantile(values, 0.5)


def quantile(values: Sequence[float], q: float) -> float:
    """Quantile with linear interpolation."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def per_layer(
    times_us: Sequence[float], separator_us: Sequence[float] | None, num_steps: int
) -> list[float]:
    """Microseconds per layer of each round: the replay less that of the separators alone."""
    if separator_us is None:
        return [time / num_steps for time in times_us]
    return [(t - s) / num_steps for t, s in zip(times_us, separator_us, strict=True)]


def mean_of_medians(draws: Sequence[Sequence[float]]) -> float:
    """Microseconds per layer over draws: each draw's median counts the same."""
    return sum(median(rounds) for rounds in draws) / len(draws)


def speed_up(
    base: Sequence[Sequence[float]], ours: Sequence[Sequence[float]], seed: int = 0
) -> Ratio:
    """How many times faster `ours` is than `base`.

    Args:
        base, ours: a list of rounds per draw; round i of both was measured together.
    Returns:
        The mean of the draws' medians of `base` over that of `ours`, and the middle 95 % of the
        same ratio over resamples of the rounds (those of one round stay together).
    Raises:
        ValueError: numbers of draws or rounds that differ.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = torch.zeros(2, RESAMPLES, dtype=torch.float64)
    for one, other in zip(base, ours, strict=True):
        if len(one) != len(other):
            raise ValueError(f"speed_up: {len(one)} rounds and {len(other)}; as many are needed")
        pair = torch.tensor([one, other], dtype=torch.float64)  # (2, rounds)
        picks = torch.randint(len(one), (RESAMPLES, len(one)), generator=generator)
        totals += pair[:, picks].quantile(0.5, dim=-1)
    ratios = totals[0] / totals[1]
    tail = (1 - LEVEL) / 2
    return Ratio(
        mean_of_medians(base) / mean_of_medians(ours),
        float(ratios.quantile(tail)),
        float(ratios.quantile(1 - tail)),
    )


def is_one(ratio: Ratio, tolerance: float = 0.02) -> bool:
    """Whether a ratio that must be 1 is: its interval holds 1, or it is within the tolerance."""
    return ratio.low <= 1 <= ratio.high or abs(ratio.ratio - 1) <= tolerance


def gb_s(num_bytes: float, us: float) -> float:
    """Rate in 10^9 bytes per second."""
    return num_bytes / us / 1000
