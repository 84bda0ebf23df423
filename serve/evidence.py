"""What can be learnt about a wedged engine: its processes, their stacks, the GPUs.

Python stacks come from py-spy where it is installed. Without it each process is aborted: it was
started with PYTHONFAULTHANDLER, whose handler writes the stacks of all threads even while the
interpreter is held in a kernel launch, and the engine is to be ended anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from serve.threads import in_thread

TOOL_S = 10.0
ABORT_S = 3.0
# Only names that say how ranks reduce and what is compiled; never a key.
SHOWN = ("NCCL_", "CUDA_VISIBLE", "VLLM_", "OMP_", "DSV4_")
HIDDEN = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def group_members(group: int) -> list[int]:
    """The processes of a process group that live."""
    members = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(ValueError, OSError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                members.append(int(entry.name))
    return sorted(members)


def process_facts(pid: int) -> dict[str, Any]:
    """Name, state, memory, where each thread waits in the kernel; unreadable parts are absent."""
    facts: dict[str, Any] = {"pid": pid}
    folder = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
        facts["name"] = command.decode("utf-8", "replace")[:80].strip()
    with contextlib.suppress(OSError):
        lines = (folder / "status").read_text().splitlines()
        wanted = ("State", "VmRSS", "Threads")
        facts |= {k: v.strip() for k, _, v in (ln.partition(":") for ln in lines) if k in wanted}
    threads = []
    with contextlib.suppress(OSError):
        for task in sorted((folder / "task").iterdir()):
            with contextlib.suppress(OSError):
                name, wait = (task / "comm").read_text(), (task / "wchan").read_text()
                threads.append(f"{task.name} {name.strip()} {wait.strip()}")
    facts["threads"] = threads
    return facts


def shown_environment(pid: int) -> dict[str, str]:
    """The variables of a process that matter for a hang."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace")
    except OSError:
        return {}
    pairs = (entry.partition("=") for entry in raw.split("\0"))
    return {
        name: value
        for name, _, value in pairs
        if name.startswith(SHOWN) and not any(word in name for word in HIDDEN)
    }


async def run_tool(*command: str) -> str:
    """A tool's output, or why there is none; at most TOOL_S."""
    if shutil.which(command[0]) is None:
        return f"{command[0]}: not installed"
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    try:
        output, _ = await asyncio.wait_for(process.communicate(), TOOL_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            process.kill()
        return f"{command[0]}: no answer within {TOOL_S:g} s"
    return output.decode("utf-8", "replace")


async def abort_for_stacks(
    pids: list[int], tail: Iterable[str], all_read: asyncio.Event
) -> list[str]:
    """Abort the processes, and take the lines they print meanwhile."""
    before = list(tail)
    for pid in pids:
        for number in (signal.SIGABRT, signal.SIGCONT):  # a stopped one takes it when it goes on
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    deadline = time.monotonic() + ABORT_S
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in pids):
        await asyncio.sleep(0.05)
    # What they printed last is on its way; another process may hold the output open.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(all_read.wait(), ABORT_S)
    after = list(tail)
    # The tail is bounded: lines of `before` may have left it.
    for start in range(len(before) + 1):
        if after[: len(before) - start] == before[start:]:
            return after[len(before) - start :]
    return after


async def gather_evidence(
    group: int, tail: Iterable[str], all_read: asyncio.Event
) -> dict[str, Any]:
    """Everything about a process group. Its processes are aborted where py-spy is absent.

    Args:
        tail: the latest lines of its output, which come meanwhile.
        all_read: set when all of its output is in `tail`.
    """
    pids = group_members(group)
    evidence: dict[str, Any] = {
        "schema_version": 1,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processes": [{"pid": pid, "unreadable": True} for pid in pids],
        "environment": {},
        "log": list(tail),
    }
    # Of a process that waits in a driver, memory and all that is read from there may be locked.
    with contextlib.suppress(TimeoutError):
        read = in_thread(lambda: ([process_facts(pid) for pid in pids], shown_environment(group)))
        evidence["processes"], evidence["environment"] = await asyncio.wait_for(read, TOOL_S)
    evidence["gpus"], evidence["links"] = await asyncio.gather(
        run_tool("nvidia-smi"), run_tool("nvidia-smi", "topo", "-m")
    )
    if shutil.which("py-spy"):
        dumps = (run_tool("py-spy", "dump", "--native", "--pid", str(pid)) for pid in pids)
        evidence["stacks"] = "\n".join(await asyncio.gather(*dumps)).split("\n")
    else:
        evidence["stacks"] = await abort_for_stacks(pids, tail, all_read)
    return evidence
