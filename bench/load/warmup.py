"""Warm-up: rounds with other prompts until the time per token stands still."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from bench import metrics
from bench.load.config import Cell
from bench.load.errors import ServerUnusable, Unbelievable
from bench.load.rounds import Runner
from bench.load.trace import Trace

SETTLED = 0.03  # two medians in a row differ by less
# Shallower and shorter than what is measured: kernels are compiled and graphs captured by then,
# and a cold prompt of half a million tokens is not sent for nothing.
MOST_DEPTH = 8192
MOST_OUTPUT = 64


@dataclass(frozen=True)
class WarmUp:
    """Median TPOT of each round. settled: None where there was nothing to compare."""

    max_concurrency: int
    depth: int
    tpot_ms: tuple[float | None, ...]
    settled: bool | None


def is_settled(medians: list[float | None]) -> bool:
    """Whether the last two agree."""
    if len(medians) < 2 or not medians[-1] or not medians[-2]:
        return False
    return abs(medians[-1] - medians[-2]) <= SETTLED * medians[-2]


async def warm_up(runner: Runner, cells: list[Cell], say: Callable[[str], None]) -> list[WarmUp]:
    """Warm up once for each number of streams, at the largest of its depths that is allowed.

    Raises:
        ServerUnusable: a request failed.
        Unbelievable: the server has counters of drafts, and they stand still.
    """
    before = await runner.server.counters()
    done = [await _one(runner, cell, say) for cell in warm_up_cells(cells)]
    moved = (await runner.server.counters()).since(before)
    if done and any(d.tpot_ms for d in done) and moved.num_drafts == 0:
        raise Unbelievable(
            "speculation: the server exports counters of drafts, and they stayed at 0 over the "
            "warm-up: the MTP head is inert"
        )
    return done


def warm_up_cells(cells: list[Cell]) -> list[Cell]:
    """One cell for each number of streams."""
    chosen: dict[int, Cell] = {}
    for cell in cells:
        depth = min(cell.depth, MOST_DEPTH)
        if cell.streams not in chosen or depth > chosen[cell.streams].depth:
            chosen[cell.streams] = replace(cell, depth=depth)
    return list(chosen.values())


async def _one(runner: Runner, cell: Cell, say: Callable[[str], None]) -> WarmUp:
    medians: list[float | None] = []
    output = min(runner.config.output, MOST_OUTPUT)
    for attempt in range(runner.config.max_warm_up_rounds):
        traces = await runner.warm_up(cell, attempt, output)
        for sent in traces:
            if sent.error:
                raise ServerUnusable(f"warm-up: {sent.error}")
        medians.append(metrics.median([_tpot(t) for t in traces]))
        shown = "-" if medians[-1] is None else f"{medians[-1]:.2f}"
        say(f"warm-up, {cell.streams} streams, round {attempt + 1}: TPOT {shown} ms")
        if is_settled(medians):
            break
    settled = is_settled(medians) if len(medians) > 1 else None
    if settled is False:
        say(f"warm-up, {cell.streams} streams: TPOT is still moving; measured all the same")
    return WarmUp(cell.streams, cell.depth, tuple(medians), settled)


def _tpot(sent: Trace) -> float | None:
    if sent.first_s is None or sent.last_s is None or sent.output_tokens is None:
        return None
    ttft, e2el = (
        metrics.ttft_ms(sent.sent_s, sent.first_s),
        metrics.e2el_ms(sent.sent_s, sent.last_s),
    )
    return metrics.tpot_ms(e2el, ttft, sent.output_tokens)
