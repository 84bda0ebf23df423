"""Runs the processes of one arm of a benchmark: to their end or to a deadline, never beyond.

A process prints what it measured as JSON objects, one a line, as it goes. They are handed on as
they come and kept, whatever becomes of the process. One that fails ends the others: they wait for
it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLL_S = 0.1
# From the kill to giving up on a process: one in the driver may not die, and must not hold us.
END_S = 10.0
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


@dataclass
class Ran:
    """error: why the arm did not come to its end, None if it did. lines: of each process."""

    lines: list[list[dict[str, Any]]]
    error: str | None = None


@dataclass
class Process:
    """A process and what it has printed."""

    popen: subprocess.Popen[bytes]
    out: Path
    errors: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    num_read: int = 0  # bytes of whole lines

    def read(self) -> list[dict[str, Any]]:
        """The objects that came since the last call; other lines are passed over."""
        with self.out.open("rb") as file:
            file.seek(self.num_read)
            whole, _, _ = file.read().rpartition(b"\n")
        new = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                new.append(json.loads(line))
        new = [found for found in new if isinstance(found, dict)]
        self.num_read += len(whole) + 1 if whole else 0
        self.lines += new
        return new

    def failure(self) -> str:
        """Its exit status and its last words."""
        said = self.errors.read_text(encoding="utf-8", errors="replace").strip()
        last = (said.splitlines() or ["no output"])[-1]
        return f"status {self.popen.returncode}: {last[:300]}"


def run_processes(
    commands: Sequence[Sequence[str]],
    cwd: Path,
    environment: Mapping[str, str],
    timeout_s: float,
    on_line: Callable[[int, dict[str, Any]], object] = lambda *_: None,
) -> Ran:
    """Start the commands together and wait for them.

    Args:
        timeout_s: after it all are killed, with what they started.
        on_line: takes the index of a process and an object that it printed.
    """
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        processes: list[Process] = []
        try:
            for number, command in enumerate(commands):
                processes.append(start(command, cwd, environment, Path(folder), number))
            error = wait(processes, deadline, timeout_s, on_line)
        finally:
            alive = end(processes)
        forward(processes, on_line)
    if alive:
        error = f"{error or 'ended'}; process {', '.join(map(str, alive))} does not die"
    return Ran([process.lines for process in processes], error)


def start(
    command: Sequence[str], cwd: Path, environment: Mapping[str, str], folder: Path, number: int
) -> Process:
    """Start one, in a group of its own; its output goes to files, which never fill up."""
    out, errors = folder / f"out-{number}", folder / f"errors-{number}"
    with out.open("wb") as out_file, errors.open("wb") as errors_file:
        popen = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=errors_file,
            start_new_session=True,
            preexec_fn=functools.partial(die_with, os.getpid()),
        )
    return Process(popen, out, errors)


def die_with(parent: int) -> None:
    """Runs in the child: a rank that spins on a GPU must not outlive the benchmark."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def wait(
    processes: Sequence[Process],
    deadline: float,
    timeout_s: float,
    on_line: Callable[[int, dict[str, Any]], object],
) -> str | None:
    """Until all ended well; else what went wrong first."""
    while True:
        ended = [process for process in processes if process.popen.poll() is not None]
        forward(processes, on_line)
        if failed := [process for process in ended if process.popen.returncode]:
            return failed[0].failure()
        if len(ended) == len(processes):
            return None
        if time.monotonic() > deadline:
            return f"no end within {timeout_s:g} s"
        time.sleep(POLL_S)


def forward(processes: Sequence[Process], on_line: Callable[[int, dict[str, Any]], object]) -> None:
    """Hand on what came."""
    for number, process in enumerate(processes):
        for line in process.read():
            on_line(number, line)


def end(processes: Sequence[Process]) -> list[int]:
    """Kill all before any is waited for: one may not die while another holds its memory.

    Returns:
        The process ids that are still there after END_S.
    """
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.popen.pid, signal.SIGKILL)
    deadline = time.monotonic() + END_S
    alive = []
    for process in processes:
        try:
            process.popen.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            alive.append(process.popen.pid)
    return alive
