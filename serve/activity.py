"""Signs that an engine works while it says nothing: what its processes do that a hang does not.

CPU time is no such sign. A rank that waits for a collective that never ends spins in user space,
and so does what waits for that rank. But a spin starts no process, touches no new page and moves
no bytes, while compilers, weights and caches do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Of a process, between two looks. In two seconds a hung engine of two ranks on a CPU had 0 pages
# and 268 bytes at most; sympy, which Inductor leans on, 214 pages, LLVM in a process 17,000.
PAGES = 32  # 128 KiB that were touched for the first time, or read from a mapped file
IO_BYTES = 64 * 1024
CPU_SHARE = 0.1  # of a core, by programs other than the engine's own
IO_FIELDS = ("rchar", "wchar")  # of /proc/PID/io
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Counts:
    """What a process has done since it began.

    pages: page faults of its own; ended_pages: of children that ended; ticks: of CPU time.
    io_bytes: read and written through system calls; program: its file. Unreadable: 0, "".
    """

    pages: int
    ended_pages: int
    ticks: int
    io_bytes: int
    program: str


Session = Mapping[tuple[int, int], Counts]  # by process id and start, which no two share


def read_session(leader: int) -> Session:
    """Every process of the session that `leader` began: the engine, its ranks, their compilers.

    Not its process group: ninja gives each compiler a group of its own.
    """
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError):
            text = Path(entry.path, "stat").read_text(encoding="utf-8", errors="replace")
            state, *numbers = text.rpartition(")")[2].split()
            fields = [int(number) for number in numbers[:19]]
            if fields[2] != leader or state == "Z":
                continue
            _, _, _, _, _, _, minor, ended_minor, major, ended_major, user, system = fields[:12]
            found[int(entry.name), fields[18]] = Counts(
                pages=minor + major,
                ended_pages=ended_minor + ended_major,
                ticks=user + system,
                io_bytes=read_io_bytes(entry.path),
                program=read_program(entry.path),
            )
    return found


def read_io_bytes(folder: str) -> int:
    """Bytes that a process has read and written; 0 where the kernel does not say."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path(folder, "io").read_text().splitlines()
        return sum(int(n) for k, _, n in (ln.partition(":") for ln in lines) if k in IO_FIELDS)
    return 0


def read_program(folder: str) -> str:
    """The file that a process runs; "" where the kernel does not say."""
    with contextlib.suppress(OSError):
        return str(Path(folder, "exe").readlink())
    return ""


def works(
    before: Session, after: Session, leader: int, seconds: float, serving: bool = False
) -> bool:
    """Whether there are signs of work between two looks, `seconds` apart.

    serving: requests come, which the leader reads and hands on, also to an engine that hangs: its
    pages and everybody's bytes say nothing then.
    """
    if before.keys() != after.keys():
        return True  # a process began or ended
    own = next((counts.program for (pid, _), counts in after.items() if pid == leader), "")
    ticks = 0
    for key, now in after.items():
        then = before[key]
        if now.ended_pages > then.ended_pages:
            return True  # a child began and ended between the looks
        if now.pages - then.pages >= PAGES and not (serving and key[0] == leader):
            return True
        if now.io_bytes - then.io_bytes >= IO_BYTES and not serving:
            return True
        ticks += now.ticks - then.ticks if now.program != own else 0
    return ticks * TICK_S >= CPU_SHARE * seconds
