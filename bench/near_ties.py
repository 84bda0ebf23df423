"""Where greedy answers part at a near-tie: the gap of the two best tokens against its own noise.

A bf16 engine computes slightly other logits for another batch shape. With speculation a pass holds
more tokens than without, so two tokens that are nearly as likely may change places. How far the
gap moves by itself is measured on the server without MTP: each prompt alone, then several at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.client import Choices, Client
from bench.measurement import Difference, Measurement, Prompt


@dataclass(frozen=True)
class GapStudy:
    """The same prompts in two batch shapes. noise: of the gap, in nats."""

    alone: tuple[Choices, ...]
    together: tuple[Choices, ...]
    max_concurrency: int
    noise: float


async def study_gaps(
    client: Client, model: str, prompts: Sequence[Prompt], max_tokens: int, max_concurrency: int
) -> GapStudy:
    """Ask each prompt alone, then `max_concurrency` at once. None of these requests is timed."""
    alone = [await client.choices(model, prompt.text, max_tokens) for prompt in prompts]
    together: list[Choices] = []
    for start in range(0, len(prompts), max_concurrency):
        group = prompts[start : start + max_concurrency]
        together += await asyncio.gather(
            *(client.choices(model, prompt.text, max_tokens) for prompt in group)
        )
    noise = gap_noise(alone, together)
    return GapStudy(tuple(alone), tuple(together), max_concurrency, noise)


def gap_noise(alone: Sequence[Choices], together: Sequence[Choices]) -> float:
    """Largest change of the gap over all positions with the same context in both runs."""
    return max(gap_movements(alone, together), default=0.0)


def gap_movements(alone: Sequence[Choices], together: Sequence[Choices]) -> list[float]:
    """Change of the gap, in nats, at each position with the same context in both runs.

    Up to the first token that differs, and at that token, both have the same context.
    """
    moved = []
    for a, b in zip(alone, together, strict=True):
        same = first_difference(a.token_ids, b.token_ids)
        end = min(len(a.token_ids), len(b.token_ids)) if same is None else same + 1
        moved += [abs(a.gap(i) - b.gap(i)) for i in range(end)]
    return moved


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs, over the shorter of the two; None without one."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def with_gaps(
    differences: Sequence[Difference],
    prompts: Sequence[Prompt],
    base: Measurement,
    other: Measurement,
    study: GapStudy,
) -> list[Difference]:
    """Return the differences with the gap there, where the study has the same context.

    The gap is None, which is no near-tie, where both runs of the study parted from the measured
    answer before, or where the other answer's token is not one of the two best.
    """
    index = {prompt.id: i for i, prompt in enumerate(prompts)}
    found = []
    for difference in differences:
        i = index[difference.prompt_id]
        left, right = base.completions[i].token_ids, other.completions[i].token_ids
        gap = None
        if difference.unit == "token" and left is not None and right is not None:
            runs = (study.alone[i], study.together[i])
            gap = _gap_at(left, right, difference.position, runs)
        found.append(replace(difference, gap=gap, near_tie=gap is not None and gap <= study.noise))
    return found


def _gap_at(
    left: tuple[int, ...], right: tuple[int, ...], at: int, runs: Sequence[Choices]
) -> float | None:
    if at >= len(left) or at >= len(right):
        return None
    for run in runs:
        if run.token_ids[:at] == left[:at] and at < len(run.best):
            two = {token for token, _ in run.best[at]}
            return run.gap(at) if {left[at], right[at]} == two else None
    return None
