"""How far an engine's log-probabilities may lie from the exact ones: as far as bfloat16 must.

The plain-PyTorch model with the same dequantized weights is exact in float64; in bfloat16 it shows
what the number format costs. Per position, the error is the RMS over the vocabulary. Where a
router is near a tie, rounding decides which expert is taken, and such a flip makes that position
some thirty times worse, in any model: the 90th percentile hangs on which ties fall. One bfloat16
run is one throw of those dice (percentiles from 0.042 to 0.066 were seen), so the yardstick throws
several times: each with a tenth of the embedding's values moved to the neighbouring bfloat16,
which leaves the lower quartile within 5 % of the unmoved model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.engine.engine import EngineRun
from tiny.load import load
from tiny.model import DeepseekV4

ALLOWED = 1.5
QUANTILES = (0.5, 0.75, 0.9)
THROWS = 5
MOVED_SHARE = 0.1
# A little over half a step of bfloat16 just above a power of two, one step just below.
ONE_STEP = 1.001 * 2**-8


@contextmanager
def moved_embedding(model: DeepseekV4, seed: int) -> Iterator[None]:
    """The model with some of its embedding's values one bfloat16 up or down."""
    weight = model.embed.weight.data
    kept = weight.clone()
    generator = torch.Generator().manual_seed(seed)
    moved = torch.rand(weight.shape, generator=generator) < MOVED_SHARE
    sign = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
    weight.mul_(1 + ONE_STEP * moved * sign)
    try:
        yield
    finally:
        weight.copy_(kept)


class Yardstick:
    """The plain model of one checkpoint; what was computed for one text is kept."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = load(checkpoint)
        self._kept: dict[tuple[tuple[int, ...], int], tuple[torch.Tensor, torch.Tensor]] = {}

    def _log_p(self, tokens: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad():
            logits = self.model(torch.tensor([tokens]), dtype=dtype)[0]
        return torch.log_softmax(logits.double(), -1)

    def _exact_and_throws(
        self, tokens: tuple[int, ...], last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log p (last, vocabulary) in float64, and the throws' errors (THROWS, last)."""
        key = tokens, last
        if key not in self._kept:
            exact = self._log_p(tokens, torch.float64)[-last:]
            errors = []
            for seed in range(THROWS):
                with moved_embedding(self.model, seed):
                    errors.append(rms(self._log_p(tokens, torch.bfloat16)[-last:] - exact))
            self._kept[key] = exact, torch.stack(errors)
        return self._kept[key]

    def errors(
        self, tokens: list[int], logprobs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RMS errors of an engine (positions,) and of the throws (THROWS, positions).

        logprobs: (positions, vocabulary), the engine's, at the last positions of `tokens`.
        """
        exact, throws = self._exact_and_throws(tuple(tokens), len(logprobs))
        return rms(logprobs.double() - exact), throws

    def least_gap(self, context: list[int], token: int, other: int, throws: int) -> float:
        """Of log p of two next tokens, the least that so many throws have: nats."""
        gaps = []
        for seed in range(throws):
            with moved_embedding(self.model, seed):
                log_p = self._log_p(tuple(context), torch.bfloat16)[-1]
            gaps.append((log_p[token] - log_p[other]).item())
        return min(gaps)

    def assert_close(self, requests: list[dict[str, Any]], run: EngineRun) -> None:
        """Fail where a quantile of the engine's errors is over ALLOWED times the throws'."""
        engine, plain = [], []
        for index, asked in enumerate(requests):
            tokens = asked["ids"] + run.tokens(index)[:-1]
            errors, throws = self.errors(tokens, run.logprobs(index))
            engine.append(errors)
            plain.append(throws.flatten())
        for quantile in QUANTILES:
            ours, bf16 = (torch.cat(parts).quantile(quantile).item() for parts in (engine, plain))
            assert ours <= ALLOWED * bf16, f"quantile {quantile}: {ours:.4f}, bf16 {bf16:.4f}"
        # No length may hide behind the others.
        for length in {len(asked["ids"]) for asked in requests}:
            chosen = [i for i, asked in enumerate(requests) if len(asked["ids"]) == length]
            ours, bf16 = (
                torch.cat([parts[i] for i in chosen]).median().item() for parts in (engine, plain)
            )
            assert ours <= 2 * ALLOWED * bf16, f"length {length}: {ours:.4f}, bf16 {bf16:.4f}"


def rms(error: torch.Tensor) -> torch.Tensor:
    """Over the last dimension."""
    return error.square().mean(-1).sqrt()


@cache
def yardstick(checkpoint: Path) -> Yardstick:
    """One per checkpoint of a test run, so that several tests share its texts."""
    return Yardstick(checkpoint)
