"""Base against candidate: the same items, asked of two servers.

McNemar's exact test looks at the items that only one of them got right. What no test can see with
so many items is said beside it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bench.eval import stats
from bench.eval.items import Verdict
from bench.load.errors import LoadError
from bench.load.markdown import table

HEAD = ["task", "n", "base", "candidate", "difference", "lost / gained", "p (McNemar)",
        "cannot see a loss below", "verdict"]  # fmt: skip
# What two runs of one model flip each way is not known below some discordant pairs.
LEAST_CHURN = 0.005


@dataclass(frozen=True)
class Paired:
    """One task. lost: right in base only; gained: right in the candidate only."""

    task: str
    n: int
    base: float
    head: float
    lost: int
    gained: int
    p: float
    churn: float
    detectable_loss: float | None
    valid: bool

    @property
    def is_loss(self) -> bool:
        """Whether the candidate is worse beyond chance."""
        return self.lost > self.gained and self.p < stats.ALPHA

    @property
    def verdict(self) -> str:
        """In words that claim no more than the test does."""
        if not self.valid:
            return "not valid"
        if self.is_loss:
            return "LOSS"
        if self.p < stats.ALPHA:
            return "gain"
        return "no loss shown"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"verdict": self.verdict}


def compare(base: dict[str, Any], head: dict[str, Any]) -> list[Paired]:
    """Every task that both results have.

    Raises:
        LoadError: none, or a task's items are not the same.
    """
    heads = {entry["task"]: entry for entry in head["tasks"]}
    both = [(entry, heads[entry["task"]]) for entry in base["tasks"] if entry["task"] in heads]
    if not both:
        raise LoadError("the results share no task")
    return [_paired(a, b) for a, b in both]


def notes(base: dict[str, Any], head: dict[str, Any]) -> list[str]:
    """How the two runs differ otherwise."""
    found = []
    for key in ("reasoning", "temperature", "max_tokens", "streams", "seed"):
        a, b = base["config"][key], head["config"][key]
        if a != b:
            found.append(f"{key}: base {a}, candidate {b}")
    a, b = base["server"]["version"], head["server"]["version"]
    if a != b:
        found.append(f"vLLM: base {a}, candidate {b}")
    return found


def render(pairs: list[Paired]) -> str:
    """The table."""
    rows = [
        [
            pair.task, f"{pair.n:,}", f"{pair.base:.1%}", f"{pair.head:.1%}",
            f"{100 * (pair.head - pair.base):+.1f} points", f"{pair.lost} / {pair.gained}",
            f"{pair.p:.3g}",
            "-" if pair.detectable_loss is None else f"{100 * pair.detectable_loss:.1f} points",
            pair.verdict,
        ]
        for pair in pairs
    ]  # fmt: skip
    return table(HEAD, rows)


def _paired(base: dict[str, Any], head: dict[str, Any]) -> Paired:
    task = base["task"]
    a, b = (dict(map(tuple, entry["items"])) for entry in (base, head))
    common = [name for name in a if name in b]
    if base["items_sha256"] != head["items_sha256"] and not _is_part(base, head, common):
        raise LoadError(
            f"{task}: the items are not the same: {base['data']['source']} and "
            f"{head['data']['source']}, {len(common)} in common of {len(a)} and {len(b)}"
        )
    right = Verdict.CORRECT.value
    lost = sum(a[name] == right != b[name] for name in common)
    gained = sum(b[name] == right != a[name] for name in common)
    n = len(common)
    churn = max(LEAST_CHURN, min(lost, gained) / n)
    return Paired(
        task=task,
        n=n,
        base=sum(a[name] == right for name in common) / n,
        head=sum(b[name] == right for name in common) / n,
        lost=lost,
        gained=gained,
        p=stats.mcnemar(lost, gained),
        churn=churn,
        detectable_loss=stats.detectable_loss(n, churn),
        valid=not base["problems"] and not head["problems"],
    )


def _is_part(base: dict[str, Any], head: dict[str, Any], common: list[str]) -> bool:
    """Whether one run asked a part of the other's items, of the same data."""
    same = base["data"]["sha256"] is not None and base["data"] == head["data"]
    return same and len(common) > 0 and len(common) == min(base["n"], head["n"])
