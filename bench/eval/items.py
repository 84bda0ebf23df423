"""Items, the order in which they are asked, and their verdicts."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Message = dict[str, str]


@dataclass(frozen=True)
class Item:
    """One question. group: what shares are told apart by (subject, context). extra: the scorer's.

    max_tokens: of the answer; None is the run's. fresh: its text begins anew in each run, so that
    the same item is known by its name.
    """

    id: str
    messages: tuple[Message, ...]
    expected: str
    group: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    fresh: bool = False


class Verdict(StrEnum):
    """Every item has one. Only `correct` counts for the score."""

    CORRECT = "correct"
    WRONG = "wrong"
    INVALID = "invalid"  # no answer, or several, could be read
    REFUSED = "refused"  # the text declines; counts as invalid
    TRUNCATED = "truncated"  # cut off before its end: whatever it holds is no answer
    FAILED = "failed"  # no answer from the server, or one that it gave up

    @property
    def is_answered(self) -> bool:
        """Whether there was an answer to judge."""
        return self in (Verdict.CORRECT, Verdict.WRONG)


@dataclass(frozen=True)
class Judged:
    """What a scorer says of a text. value: what was read from it. details: of a program's run."""

    verdict: Verdict
    value: str | None
    how: str
    details: dict[str, Any] = field(default_factory=dict)


Scorer = Callable[[Item, str], Awaitable[Judged]]


def chosen(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """So many items, spread over the groups by their sizes, in an order that the seed gives.

    The first n of a larger choice are the choice of n: a quick run asks a part of the full one.
    """
    groups: dict[str | None, list[Item]] = defaultdict(list)
    for item in sorted(items, key=lambda i: _rank(seed, i.id)):
        groups[item.group].append(item)
    placed = [
        ((place + 0.5) / len(members), _rank(seed, item.id), item)
        for members in groups.values()
        for place, item in enumerate(members)
    ]
    ordered = [item for _, _, item in sorted(placed, key=lambda p: p[:2])]
    return ordered if limit is None else ordered[:limit]


def fingerprint(items: Sequence[Item]) -> str:
    """SHA-256 of what is asked and expected: two runs with the same one asked the same."""
    digest = hashlib.sha256()
    for item in items:
        asked = () if item.fresh else item.messages
        digest.update(repr((item.id, asked, item.expected, item.max_tokens)).encode())
    return digest.hexdigest()


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()
