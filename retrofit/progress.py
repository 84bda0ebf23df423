"""A progress bar with the time left, on standard error."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 28
LINE_EVERY_S = 30.0
REDRAW_EVERY_S = 0.2


class Progress:
    """Counts towards a total. On a terminal one line is redrawn, elsewhere a line is now and then.

    Args:
        label: what is counted.
        total: how many there are.
        done: how many of them an earlier run did; they do not count for the time left.
    """

    def __init__(self, label: str, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        self.label, self.total, self.done, self.first = label, total, done, done
        self.stream = stream or sys.stderr
        self.started = time.monotonic()
        self.shown = 0.0

    def step(self, count: int = 1) -> None:
        """Count and, if it is time, show."""
        self.done += count
        now = time.monotonic()
        every = REDRAW_EVERY_S if self.stream.isatty() else LINE_EVERY_S
        if now - self.shown >= every or self.done >= self.total:
            self.shown = now
            ending = "\r" if self.stream.isatty() and self.done < self.total else "\n"
            self.stream.write(self.line(now - self.started) + ending)
            self.stream.flush()

    def line(self, elapsed_s: float) -> str:
        """`quantize [#####.....] 12/256, 0:31 passed, 10:25 left`"""
        filled = WIDTH * self.done // max(self.total, 1)
        bar = "#" * filled + "." * (WIDTH - filled)
        counted = self.done - self.first
        left = "?"
        if counted:
            left = duration(elapsed_s / counted * (self.total - self.done))
        return (
            f"{self.label} [{bar}] {self.done}/{self.total}, "
            f"{duration(elapsed_s)} passed, {left} left"
        )


def duration(seconds: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
