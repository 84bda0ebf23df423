"""Whether MTP changes greedy texts beyond what another batch shape changes without it.

A bf16 engine computes slightly other logits in another batch shape, or where the keys lie otherwise
in its cache, and where a router's scores nearly tie, a token may even go to another expert. So
texts part without MTP, too: mostly, but not only, where two tokens are nearly as likely. No single
parting is held against MTP. Two kinds are counted in the control and with MTP, and each is compared
by a paired exact test over the prompts: texts that part at all, and texts that part at a clear
token, where the noise does not explain it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.client import Choices
from bench.eval import stats
from bench.eval.compare import LEAST_CHURN
from bench.eval.parity import BEST, Control, Speculative
from bench.load.errors import Unbelievable
from bench.measurement import Prompt
from bench.near_ties import first_difference, gap_movements

# Of each of the two tests, one-sided: a sound engine fails one of them at most twice in a hundred.
ALPHA = 0.01
# Of the gap's movements. Their largest is no limit: where a token goes to another expert, which is
# rare, the gap can move by more than a nat.
QUANTILE = 0.99


@dataclass(frozen=True)
class Parting:
    """Where a text leaves the first one without MTP. gap: there, log p of the first text's token
    less that of the other's, in nats; None where one is not among the best, or a text ended."""

    prompt_id: str
    position: int
    gap: float | None

    def within(self, noise: float) -> bool:
        """Whether it is a near-tie, which the noise explains."""
        return self.gap is not None and self.gap <= noise


@dataclass(frozen=True)
class Excess:
    """Texts of a kind with MTP against those of the control, paired by prompt.

    p: one-sided, of McNemar's exact test. detectable: the smallest share of texts, beyond the
    control's, that is found with 80 % probability; None where no share can be.
    """

    control: int
    mtp: int
    mtp_only: int
    control_only: int
    p: float
    detectable: float | None

    @classmethod
    def of(cls, n: int, control: set[str], mtp: set[str]) -> Excess:
        """The two sets of prompt ids, of n."""
        more, less = len(mtp - control), len(control - mtp)
        churn = max(LEAST_CHURN, less / n) if n else LEAST_CHURN  # what differs without MTP's doing
        # The tables of power are two-sided.
        seen = stats.detectable_loss(n, churn, alpha=2 * ALPHA)
        # MTP cannot spoil more texts than the control leaves whole.
        possible = seen is not None and seen * n <= n - len(control)
        p = stats.mcnemar_loss(more, less)
        return cls(len(control), len(mtp), more, less, p, seen if possible else None)

    @property
    def is_shown(self) -> bool:
        """Whether MTP has more, beyond chance."""
        return self.p <= ALPHA


def partings(
    prompts: Sequence[Prompt], base: Sequence[Choices], other: Sequence[Sequence[int]]
) -> list[Parting]:
    """The texts that part from the base's, each where it does."""
    found = []
    for prompt, run, ids in zip(prompts, base, other, strict=True):
        at = first_difference(run.token_ids, ids)
        if at is None and len(ids) != len(run.token_ids):
            found.append(Parting(prompt.id, min(len(ids), len(run.token_ids)), None))
        elif at is not None:
            log_p = dict(run.best[at])
            mine, others = log_p.get(run.token_ids[at]), log_p.get(ids[at])
            known = mine is not None and others is not None
            found.append(Parting(prompt.id, at, mine - others if known else None))
    return found


def judge(prompts: Sequence[Prompt], control: Control, speculative: Speculative) -> dict[str, Any]:
    """The figures, and as `problems` what breaks parity."""
    moved = gap_movements(control.base, control.again)
    limit = _quantile(moved, QUANTILE)
    usual = partings(prompts, control.base, [c.token_ids for c in control.again])
    drafted = partings(prompts, control.base, speculative.token_ids)
    n = len(prompts)
    parted = Excess.of(n, _ids(usual), _ids(drafted))
    clear = Excess.of(n, _ids(_clear(usual, limit)), _ids(_clear(drafted, limit)))
    problems = []
    for excess, what in ((parted, "part"), (clear, "part at a clear token")):
        if excess.is_shown:
            problems.append(
                f"{excess.mtp} of {n} texts {what}, {excess.control} in the control, "
                f"p = {excess.p:.2g}"
            )
        elif excess.detectable is None:
            problems.append(
                f"{excess.control} of {n} texts {what} in the control: too few are left to show "
                "anything of MTP"
            )
    if clear.is_shown:
        problems[-1] += ": " + ", ".join(_place(p) for p in _clear(drafted, limit)[:3])
    if not speculative.num_drafts:
        problems.append("the server with MTP drafted nothing: this says nothing about MTP")
    elif not speculative.num_accepted_tokens:
        problems.append(
            f"none of {speculative.num_drafts} drafts was accepted: a head that is never right "
            "says nothing about MTP"
        )
    return {
        "n": n,
        "alpha": ALPHA,
        "noise": {
            "limit": limit,
            "quantile": QUANTILE,
            "num_positions": len(moved),
            "median": _quantile(moved, 0.5),
            "largest": max(moved, default=0.0),
        },
        "control": _side(n, usual, limit),
        "mtp": _side(n, drafted, limit),
        "parted": asdict(parted),
        "clear": asdict(clear),
        "num_drafts": speculative.num_drafts,
        "num_accepted_tokens": speculative.num_accepted_tokens,
        "problems": problems,
    }


def check(result: dict[str, Any]) -> None:
    """Refuse a result that shows no parity.

    Raises:
        Unbelievable: with its problems.
    """
    if result["problems"]:
        raise Unbelievable("no parity: " + "; ".join(result["problems"]))


def _quantile(values: Sequence[float], share: float) -> float:
    """One of the values, or 0 of none."""
    return float(np.quantile(values, share, method="higher")) if values else 0.0


def _ids(found: Sequence[Parting]) -> set[str]:
    return {parting.prompt_id for parting in found}


def _clear(found: Sequence[Parting], limit: float) -> list[Parting]:
    return [parting for parting in found if not parting.within(limit)]


def _side(n: int, found: Sequence[Parting], limit: float) -> dict[str, Any]:
    same = n - len(found)
    interval = stats.wilson(same, n)
    return {
        "num_identical": same,
        "share_identical": same / n if n else None,
        "interval": list(interval) if interval else None,
        "partings": [asdict(p) | {"near_tie": p.within(limit)} for p in found],
    }


def _place(parting: Parting) -> str:
    gap = f"not among the {BEST} best" if parting.gap is None else f"gap {parting.gap:.3f}"
    return f"{parting.prompt_id} at token {parting.position} ({gap})"
