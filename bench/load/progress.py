"""Lines on standard error: what was measured, what is running, how long the rest will take."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator

from bench.load.config import Cell
from bench.load.sizes import format_size

STILL_RUNNING_S = 15.0


def say(text: str) -> None:
    """Print a line."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Short text: 12 s, 3 min 05 s, 1 h 02 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def cell_name(cell: Cell) -> str:
    """Short name of a cell."""
    return f"context {format_size(cell.context)}, depth {cell.depth}, streams {cell.streams}"


class Progress:
    """How long rounds take, priming included."""

    def __init__(self, cells: list[Cell], plan: list[tuple[int, int]]) -> None:
        self._cells = cells
        self._left = list(plan)
        self._took: dict[int, list[float]] = {}

    def left_s(self) -> float | None:
        """Time left; None before the first round. Cells not seen yet are scaled by their tokens."""
        if not self._took:
            return None
        means = {cell: sum(took) / len(took) for cell, took in self._took.items()}
        per_token = sum(means[c] / self._tokens(c) for c in means) / len(means)
        return sum(means.get(cell, per_token * self._tokens(cell)) for cell, _ in self._left)

    def _tokens(self, cell: int) -> int:
        return self._cells[cell].depth * self._cells[cell].streams

    @contextlib.asynccontextmanager
    async def round(self, cell: int, repeat: int, repeats: int) -> AsyncIterator[None]:
        """Around one round: tells every so often that it is running, and what is left after it."""
        name = f"repeat {repeat + 1}/{repeats}, {cell_name(self._cells[cell])}"
        started = time.monotonic()
        usual = self._took.get(cell)
        task = asyncio.create_task(_still_running(name, max(usual) if usual else None))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        took = time.monotonic() - started
        self._took.setdefault(cell, []).append(took)
        self._left.remove((cell, repeat))
        left = self.left_s()
        say(f"{name}: {duration(took)}; about {duration(left or 0)} left")


async def _still_running(name: str, usual_s: float | None) -> None:
    started = time.monotonic()
    while True:
        await asyncio.sleep(STILL_RUNNING_S)
        hint = f", {duration(usual_s)} at most so far" if usual_s else ""
        say(f"{name}: running for {duration(time.monotonic() - started)}{hint}")
