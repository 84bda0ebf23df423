"""No time without a right answer: an arm's output against float64 on the same bytes.

The rule for ours is that of the kernels' tests: the largest error is at most twice that of
PyTorch's BF16 on dequantized weights. Others round more often and are allowed three times; the
least that is to be refused, one slot of one token left out, is far beyond both. The weights are
random bits in the tiled layout, so an arm that reads another layout than `kernels/tiled.py` says
cannot pass; that Marlin passes is the proof that one copy serves both. Of large batches some tokens
are compared and all are looked at for unwritten values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.kernels.problem import Batch, Layer
from kernels import reference
from kernels.tiled import untile_scale, untile_weight

FACTOR = 2.0
# Marlin adds the parts of a split k in BF16: up to 2.02 seen, at inter 2048 and 16 tokens.
FACTOR_OF_OTHERS = 3.0
FLOOR = 1e-5  # of the largest value: the error of plain BF16 may be 0 for tiny problems
MAX_TOKENS = 32  # compared per step


class WrongAnswer(RuntimeError):
    """An arm does not compute the layer, or a control that must fail passed."""


@dataclass(frozen=True)
class Verdict:
    """Largest errors, relative to the largest exact value, and whether the arm's is small enough.

    plain: of PyTorch's BF16. factor: of it that is allowed. tokens: how many were compared.
    """

    arm: str
    tokens: int
    error: float
    plain: float
    factor: float
    accepted: bool


@dataclass(frozen=True)
class Expected:
    """Rows of one step's output: exact float64, and PyTorch's BF16."""

    rows: torch.Tensor  # which tokens
    exact: torch.Tensor
    plain: torch.Tensor


class Checker:
    """References of one step of a batch, made once per reading of w13."""

    def __init__(self, batch: Batch, step: int, limit: float) -> None:
        self.batch = batch
        self.step = step
        self._limit = limit
        self._expected: dict[bool, Expected] = {}

    def judge(
        self, name: str, interleaved: bool, out: torch.Tensor, factor: float = FACTOR
    ) -> Verdict:
        """Compare one step's output, BF16 (tokens, hidden), of an arm that reads w13 so."""
        if interleaved not in self._expected:
            self._expected[interleaved] = expected(self.batch, self.step, interleaved, self._limit)
        wanted = self._expected[interleaved]
        size = float(wanted.exact.abs().max())
        error = float((out[wanted.rows].double() - wanted.exact).abs().max()) / size
        plain = float((wanted.plain.double() - wanted.exact).abs().max()) / size
        written = bool(torch.isfinite(out).all())
        accepted = written and error <= factor * plain + FLOOR
        shown = error if written else float("nan")
        return Verdict(name, len(wanted.rows), shown, plain, factor, accepted)


def expected(batch: Batch, step: int, interleaved: bool, limit: float) -> Expected:
    """The reference of some tokens of a step, on the batch's device.

    Args:
        interleaved: gate and up rows of w13 lie by turns of 32, as in our layout; else the first
            half of the rows is gate and the second up, as in vLLM's.
    """
    tokens = batch.num_tokens
    rows = torch.linspace(0, tokens - 1, min(tokens, MAX_TOKENS)).round().long()
    rows = rows.to(batch.hidden.device)
    ids = batch.ids[step][rows]
    used, local = ids.long().unique(return_inverse=True)
    experts = stored(batch.layer(step), used, interleaved)
    hidden, weights = batch.hidden[rows], batch.weights[step][rows]
    exact = reference.moe(hidden.double(), experts, local, weights, limit)
    plain = reference.moe(hidden, experts, local, weights, limit)
    return Expected(rows, exact, plain)


def stored(layer: Layer, used: torch.Tensor, interleaved: bool) -> reference.Experts:
    """Some experts of a layer, back in the form of a checkpoint."""
    return reference.Experts(
        untile_weight(layer.w13[used], gated=interleaved),
        untile_scale(layer.w13_scale[used], gated=interleaved),
        untile_weight(layer.w2[used]),
        untile_scale(layer.w2_scale[used]),
    )


def run_once(run: Callable[[], None], batch: Batch) -> None:
    """Run with every output poisoned: what is not written stays NaN."""
    batch.outs.fill_(float("nan"))
    run()


def step_to_compare(batch: Batch) -> int:
    """The last step, or the first one where something was not written."""
    whole = torch.isfinite(batch.outs).flatten(1).all(dim=1)
    return batch.num_steps - 1 if bool(whole.all()) else int((~whole).nonzero()[0])


def require(verdict: Verdict) -> Verdict:
    """Return an accepted verdict.

    Raises:
        WrongAnswer: it is not accepted.
    """
    if not verdict.accepted:
        raise WrongAnswer(
            f"{verdict.arm}: largest error {verdict.error:.3g} of the largest value over "
            f"{verdict.tokens} tokens; PyTorch's BF16 has {verdict.plain:.3g}, and "
            f"{verdict.factor:g} times that is allowed"
        )
    return verdict


def require_refusal(verdict: Verdict) -> Verdict:
    """Return the verdict of a control that must fail.

    Raises:
        WrongAnswer: it was accepted, so the check proves nothing.
    """
    if verdict.accepted:
        raise WrongAnswer(
            f"control {verdict.arm}: accepted with error {verdict.error:.3g}; a wrong answer must "
            "be refused"
        )
    return verdict
