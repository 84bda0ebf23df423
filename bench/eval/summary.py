"""A task's score from its items' verdicts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.eval import stats
from bench.eval.engine import Record
from bench.eval.items import Verdict
from bench.eval.tasks import Task

# Of items without an answer, invalid and truncated together. Above it, what was measured is the
# harness or the limit of tokens, not the model.
MOST_SHARE = 0.05


def summarize(task: Task, records: dict[tuple[str, str], Record]) -> dict[str, Any]:
    """One task's entry in the result. Every item asked counts, whatever became of it."""
    found = [records[key] for item in task.items if (key := (task.name.value, item.id)) in records]
    n = len(found)
    verdicts = Counter(r["verdict"] for r in found)
    correct = verdicts[Verdict.CORRECT.value]
    invalid = verdicts[Verdict.INVALID.value] + verdicts[Verdict.REFUSED.value]
    shares = {
        "invalid": _share(invalid, n),
        "truncated": _share(verdicts[Verdict.TRUNCATED.value], n),
        "failed": _share(verdicts[Verdict.FAILED.value], n),
    }
    tokens = [r["output_tokens"] for r in found if r["output_tokens"] is not None]
    runs = [r["run"] for r in found if r["run"]]
    interval = stats.wilson(correct, n)
    return {
        "task": task.name.value,
        "n": n,
        "num_planned": len(task.items),
        "num_available": task.num_available,
        "num_correct": correct,
        "score": _share(correct, n),
        "interval": list(interval) if interval else None,
        "verdicts": {v.value: verdicts[v.value] for v in Verdict},
        "shares": shares,
        "problems": problems(n, len(task.items), verdicts),
        "detectable_loss": stats.detectable_loss(n),
        "mean_output_tokens": statistics.fmean(tokens) if tokens else None,
        "syntactic_share": _share(sum(r["parses"] for r in runs), n) if runs else None,
        "groups": _groups(found),
        "data": task.origin.to_json(),
        "items_sha256": task.fingerprint,
        "items": [[r["id"], r["verdict"]] for r in found],
    }


def problems(n: int, planned: int, verdicts: Counter[str]) -> list[str]:
    """Why the score is not valid; empty where it is."""
    found = []
    truncated = verdicts[Verdict.TRUNCATED.value]
    invalid = verdicts[Verdict.INVALID.value] + verdicts[Verdict.REFUSED.value]
    if truncated + invalid > MOST_SHARE * n:
        named = [
            f"{count / n:.1%} {name}"
            for name, count in (("invalid", invalid), ("truncated", truncated))
            if count
        ]
        found.append(f"{' and '.join(named)}, more than {MOST_SHARE:.0%}")
    if failed := verdicts[Verdict.FAILED.value]:
        found.append(f"{failed / n:.1%} of the requests failed")
    if n < planned:
        found.append(f"{n} of {planned} items were asked")
    return found


def _groups(records: Sequence[Record]) -> list[dict[str, Any]]:
    names = dict.fromkeys(r["group"] for r in records if r["group"] is not None)
    groups = []
    for name in names:
        members = [r["verdict"] for r in records if r["group"] == name]
        right = members.count(Verdict.CORRECT.value)
        groups.append({"group": name, "n": len(members), "num_correct": right})
    return groups


def _share(count: int, n: int) -> float | None:
    return count / n if n else None
