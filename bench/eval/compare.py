"""Base against candidate: the same items, asked of two servers.

McNemar's exact test looks at the items that only one of them got right. What no test can see with
so many items is said beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
LOSS = "LOSS"


@dataclass(frozen=True)
class Paired:
    """One task. lost: right in base only; gained: right in the candidate only.

    num_unanswered: items that one of the two, or both, gave no answer to; they count as not right.
    answered_verdict: of the other items alone.
    """

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
    num_unanswered: int
    answered_verdict: str

    @property
    def is_loss(self) -> bool:
        """Whether the candidate is worse beyond chance."""
        return _verdict(self.lost, self.gained) == LOSS

    @property
    def verdict(self) -> str:
        """In words that claim no more than the test does."""
        return _verdict(self.lost, self.gained) if self.valid else "not valid"

    @property
    def told(self) -> str:
        """The verdict, and what becomes of it without the unanswered items where that differs."""
        if not self.valid or self.answered_verdict == self.verdict:
            return self.verdict
        return f"{self.verdict} ({self.answered_verdict} without {self.num_unanswered} unanswered)"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"verdict": self.verdict}


def compare(base: dict[str, Any], head: dict[str, Any], chosen: Sequence[str] = ()) -> list[Paired]:
    """Every task that both results have; of these the chosen ones, if any are.

    Raises:
        LoadError: none, or a task's items are not the same.
    """
    heads = {entry["task"]: entry for entry in head["tasks"]}
    both = [
        (entry, heads[entry["task"]])
        for entry in base["tasks"]
        if entry["task"] in heads and (not chosen or entry["task"] in chosen)
    ]
    if not both:
        raise LoadError("the results share no task")
    return [_paired(a, b) for a, b in both]


def unpaired(
    base: dict[str, Any], head: dict[str, Any], chosen: Sequence[str] = ()
) -> dict[str, str]:
    """Tasks that should have been compared and could not be, each with where it is.

    Those are the chosen ones; without a choice, what the base has.
    """
    in_base, in_head = ([entry["task"] for entry in one["tasks"]] for one in (base, head))
    found = {}
    for name in chosen or in_base:
        if name in in_base and name not in in_head:
            found[name] = "only in the base"
        elif name not in in_base:
            found[name] = "not in the base"
    return found


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


def render(pairs: list[Paired], missing: dict[str, str]) -> str:
    """The table; the tasks of `unpaired` are rows too."""
    rows = [
        [
            pair.task, f"{pair.n:,}", f"{pair.base:.1%}", f"{pair.head:.1%}",
            f"{100 * (pair.head - pair.base):+.1f} points", f"{pair.lost} / {pair.gained}",
            f"{pair.p:.3g}",
            "-" if pair.detectable_loss is None else f"{100 * pair.detectable_loss:.1f} points",
            pair.told,
        ]
        for pair in pairs
    ]  # fmt: skip
    rows += [[name, *["-"] * (len(HEAD) - 2), where] for name, where in missing.items()]
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
    lost, gained = _discordant(a, b, common)
    answered = [n for n in common if Verdict(a[n]).is_answered and Verdict(b[n]).is_answered]
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
        num_unanswered=n - len(answered),
        answered_verdict=_verdict(*_discordant(a, b, answered)),
    )


def _discordant(a: dict[str, str], b: dict[str, str], names: Sequence[str]) -> tuple[int, int]:
    """How many items only a got right, and only b."""
    right = Verdict.CORRECT.value
    lost = sum(a[name] == right != b[name] for name in names)
    return lost, sum(b[name] == right != a[name] for name in names)


def _verdict(lost: int, gained: int) -> str:
    if stats.mcnemar(lost, gained) >= stats.ALPHA:
        return "no loss shown"
    return LOSS if lost > gained else "gain"


def _is_part(base: dict[str, Any], head: dict[str, Any], common: list[str]) -> bool:
    """Whether one run asked a part of the other's items, of the same data."""
    same = base["data"]["sha256"] is not None and base["data"] == head["data"]
    return same and len(common) > 0 and len(common) == min(base["n"], head["n"])
