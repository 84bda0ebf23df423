"""The engine's stage and progress, read from what vLLM prints while it starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

MAX_LINE = 8192  # characters kept of a line that does not end


class Stage(StrEnum):
    """Where the engine is. Only `ready` takes requests."""

    STARTING = "starting"
    LOADING = "loading"
    PREPARING = "preparing"  # KV cache, profiling run, warm-up
    COMPILING = "compiling"
    CAPTURING = "capturing graphs"
    LISTENING = "listening"
    READY = "ready"
    DRAINING = "draining"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Progress:
    """done of total steps of a stage, when the engine counts them, and of what."""

    done: int
    total: int
    what: str


# Of a start, before it is ready.
START_STAGES = (
    Stage.STARTING,
    Stage.LOADING,
    Stage.PREPARING,
    Stage.COMPILING,
    Stage.CAPTURING,
    Stage.LISTENING,
)
# What vLLM says again and again of a wait: the only lines that are no sign of progress.
WAITING = "No available shared memory broadcast block found"
# tqdm's, with and without a drawn bar.
BAR = re.compile(
    r"(?:\([^)]*pid=\d+\)\s*)?(?P<what>[^:]+):\s+\d+%.*\|\s*(?P<done>\d+)/(?P<total>\d+) ?\["
)
# The first that a line matches decides; a later stage may be followed by an earlier one, as when
# the MTP head is loaded after the target.
MARKS = (
    (re.compile(r"checkpoint shards:"), Stage.LOADING),
    (re.compile(r"Starting to load model|Loading drafter model"), Stage.LOADING),
    (re.compile(r"Capturing CUDA graphs"), Stage.CAPTURING),
    (re.compile(r"Start compiling function|Starting torch\.compile|Compiling "), Stage.COMPILING),
    (re.compile(r"(CPU|GPU) KV cache size|Warming up |Warmup "), Stage.PREPARING),
    (re.compile(r"Starting vLLM server on |Application startup complete"), Stage.LISTENING),
)


def read_line(line: str) -> tuple[Stage, Progress | None] | None:
    """The stage that a line of the engine's output shows, with its progress; None if none."""
    for pattern, stage in MARKS:
        if pattern.search(line):
            bar = BAR.match(line)
            progress = None
            if bar:
                what = bar["what"].strip()
                progress = Progress(int(bar["done"]), int(bar["total"]), what)
            return stage, progress
    return None


class Lines:
    """Cuts a stream of bytes into lines; a carriage return ends a line, as progress bars want."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes, without their ends."""
        *whole, rest = re.split(rb"[\r\n]", self._rest + data)
        self._rest = rest[-MAX_LINE:]
        return [line.decode("utf-8", "replace") for line in whole if line]
