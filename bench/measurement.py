"""What one server answered, and where two servers' answers part."""

import json
from dataclasses import dataclass
from pathlib import Path

from bench.client import Completion
from bench.prometheus import EngineCounters


@dataclass(frozen=True)
class Prompt:
    """A held-out text."""

    id: str
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSON-lines file of {"id", "text"}; blank lines are skipped."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = (json.loads(line) for line in lines if line.strip())
    return [Prompt(str(row["id"]), row["text"]) for row in rows]


@dataclass(frozen=True)
class Measurement:
    """One server's answers to the prompts, and what its counters moved by meanwhile."""

    name: str
    num_speculative_tokens: int
    completions: tuple[Completion, ...]
    counters: EngineCounters


@dataclass(frozen=True)
class Difference:
    """The first place where two greedy answers to one prompt part.

    gap: log-probability of the best token less that of the second there, without MTP; None where
    it is not known. near_tie: the gap is at most its own noise.
    """

    prompt_id: str
    unit: str  # "token" or "character"
    position: int
    gap: float | None = None
    near_tie: bool = False


def find_differences(
    prompts: list[Prompt], base: Measurement, mtp: Measurement
) -> list[Difference]:
    """Return where the answers differ: the first token, or the first character without ids."""
    differences = []
    for prompt, a, b in zip(prompts, base.completions, mtp.completions, strict=True):
        if a.token_ids is not None and b.token_ids is not None:
            unit, left, right = "token", a.token_ids, b.token_ids
        else:
            unit, left, right = "character", tuple(a.text), tuple(b.text)
        if left != right:
            same = next(
                (i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y),
                min(len(left), len(right)),
            )
            differences.append(Difference(prompt.id, unit, same))
    return differences
