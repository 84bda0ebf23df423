"""Run a model's program where it can do no harm, or refuse to.

Layers, the first that works on this machine: bubblewrap, or a container engine with an image that
is already there. Both give the program no network, no file of this machine but a Python, a small
disk in memory, no capability. Limits of memory, time, processes, files come on top, set by the
program's own process before it reads the program; they alone would be no sandbox. What the layer
promises is tried out before the first program runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from bench.load.errors import LoadError

# Users that nobody is; systemd has them for services that come and go. The kernel counts processes
# by user over the whole machine, so that programs of one user would share their limit.
USERS = range(61184, 65520)
POLL_S = 0.05
START_S = 20.0  # of a container, on top of the program's time
REPORT_BYTES = 4096
PROGRAM = Path(__file__).with_name("inside.py")


class Outcome(StrEnum):
    """What became of a program."""

    PASSED = "passed"
    FAILED = "failed"  # a check did not hold, or an exception
    TIMEOUT = "timeout"
    MEMORY = "memory"
    NO_VERDICT = "ended without a verdict"  # it left before the checks were done, or was killed


@dataclass(frozen=True)
class Limits:
    """Of one program. memory: of each process, and of all together. disk: of its /tmp."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 512 << 20
    disk_bytes: int = 16 << 20
    processes: int = 8
    open_files: int = 64


@dataclass(frozen=True)
class Run:
    """How it went. detail: the exception, in one line."""

    outcome: Outcome
    detail: str
    wall_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Sandbox:
    """One layer. image: of a container."""

    layer: str
    command: str
    image: str | None = None
    limits: Limits = Limits()

    def run(self, source: str, check: str = "", entry_point: str = "") -> Run:
        """Run a program and then its checks, a function `check(candidate)`.

        Passed is only what comes to the end of the checks: the program's exit status says nothing.
        """
        nonce = secrets.token_hex(16)
        name = f"dsv4-maxq-eval-{nonce[:12]}"
        job = {
            "source": source,
            "check": check,
            "entry_point": entry_point,
            "nonce": nonce,
            "limits": asdict(self.limits),
            "user": user_of(name) if self._is_root else None,
        }
        started = time.monotonic()
        process = subprocess.Popen(
            self.arguments(name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        watch = _Watch(process, self.limits, 0.0 if self.layer == "bubblewrap" else START_S)
        try:
            report = watch.report(json.dumps(job).encode())
        finally:
            self._end(process, name)
        took = round(time.monotonic() - started, 3)
        if watch.stopped is not None:
            return Run(watch.stopped, f"stopped: {watch.why}", took)
        return _read(report, nonce, took)

    @property
    def _is_root(self) -> bool:
        """Root starts bubblewrap without a user namespace: the kernel counts no process of root's,
        whatever root is called inside. The program's own process then becomes another user."""
        return self.layer == "bubblewrap" and os.geteuid() == 0

    def arguments(self, name: str) -> list[str]:
        """The command that starts a Python inside."""
        if self.layer == "bubblewrap":
            return self._bubblewrap()
        limits = self.limits
        return [
            self.command, "run", "--rm", "--interactive", "--name", name, "--pull", "never",
            "--network", "none", "--read-only", "--cap-drop", "ALL",
            "--security-opt", "no-new-privileges", "--user", f"{user_of(name)}:{user_of(name)}",
            "--memory", str(limits.memory_bytes), "--memory-swap", str(limits.memory_bytes),
            "--pids-limit", str(limits.processes + 2), "--workdir", "/tmp",
            "--tmpfs", f"/tmp:rw,size={limits.disk_bytes},mode=1777", "--ipc", "private",
            "--shm-size", "1m", str(self.image),
            "python3", "-I", "-S", "-c", PROGRAM.read_text(encoding="utf-8"),
        ]  # fmt: skip

    def _bubblewrap(self) -> list[str]:
        python = Path(sys.executable).resolve()
        arguments = [
            self.command, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
            "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv",
            "--hostname", "sandbox", "--cap-drop", "ALL",
            "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp",
            "--ro-bind", "/usr", "/usr",
        ]  # fmt: skip
        if self._is_root:
            arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            arguments += ["--unshare-user"]
        for folder in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
            path = Path(folder)
            if path.is_symlink():
                arguments += ["--symlink", str(path.readlink()), folder]
            elif path.is_dir():
                arguments += ["--ro-bind", folder, folder]
        prefix = Path(sys.base_prefix).resolve()
        if not prefix.is_relative_to("/usr"):
            for folder in reversed(prefix.parents[:-1]):
                arguments += ["--perms", "0755", "--dir", str(folder)]
            arguments += ["--ro-bind", str(prefix), str(prefix)]
        if Path("/etc/ld.so.cache").exists():
            arguments += ["--ro-bind", "/etc/ld.so.cache", "/etc/ld.so.cache"]
        arguments += ["--proc", "/proc", "--dev", "/dev"]
        arguments += ["--perms", "1777", "--size", str(self.limits.disk_bytes), "--tmpfs", "/tmp"]
        # The root and /dev are memory too, without a limit.
        arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
        return [*arguments, "--", str(python), "-I", "-S", "-c",
                PROGRAM.read_text(encoding="utf-8")]  # fmt: skip

    def _end(self, process: subprocess.Popen[bytes], name: str) -> None:
        """Kill what is left. Of bubblewrap everything inside dies with its first process."""
        if self.layer != "bubblewrap" and process.poll() is None:
            subprocess.run([self.command, "kill", name], capture_output=True, check=False)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        process.wait()


def user_of(name: str) -> int:
    """The user that a run of this name is inside, one of USERS."""
    return USERS[zlib.crc32(name.encode()) % len(USERS)]


def find(image: str | None = None, limits: Limits | None = None) -> Sandbox:
    """The first layer that keeps what it promises on this machine.

    Args:
        image: for a container engine, where there is no bubblewrap; it is not pulled.
    Raises:
        LoadError: none does; the message says why each does not.
    """
    reasons = []
    candidates = [("bubblewrap", "bwrap", None)]
    if image is not None:
        candidates += [("container", "docker", image), ("container", "podman", image)]
    else:
        reasons.append("no container image was named (--sandbox-image)")
    for layer, command, used in candidates:
        path = shutil.which(command)
        if path is None:
            reasons.insert(0, f"{command} is not installed")
            continue
        found = Sandbox(layer, path, used, limits or Limits())
        problem = broken_promise(found)
        if problem is None:
            return found
        reasons.insert(0, f"{command}: {problem}")
    raise LoadError(
        "programs of a model are not run without a sandbox: "
        + "; ".join(reasons)
        + ". Install bubblewrap, or leave the task out with --tasks"
    )


def broken_promise(sandbox: Sandbox) -> str | None:
    """Try out what is promised; what does not hold, or None."""
    private = [str(PROGRAM), "/etc/passwd", *map(str, _some_files(Path.home()))]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        run = sandbox.run(
            PROBE.format(processes=sandbox.limits.processes, private=private, port=port)
        )
    return None if run.outcome is Outcome.PASSED else f"{run.outcome.value}: {run.detail}"


def _some_files(folder: Path, most: int = 3) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in sorted(folder.iterdir()) if path.is_file()][:most]
    return []


PROBE = """
import os, socket
assert os.getuid() != 0, 'runs as root'
for address in (('127.0.0.1', {port}), ('192.0.2.1', 80)):
    try:
        socket.create_connection(address, timeout=0.5)
    except OSError as error:
        assert 'timed out' not in str(error), 'has a network'
        continue
    raise AssertionError('has a network')
for path in {private!r}:
    try:
        open(path).close()
    except OSError:
        continue
    raise AssertionError(f'reads {{path}}')
for place in ('/', '/usr', '/dev/shm'):
    try:
        open(os.path.join(place, 'probe'), 'w').close()
    except OSError:
        continue
    raise AssertionError(f'writes to {{place}}')
children = []
try:
    for _ in range({processes} + 8):
        child = os.fork()
        if child == 0:
            import time
            time.sleep(5)
            os._exit(0)
        children.append(child)
    raise AssertionError('processes are not limited')
except BlockingIOError:
    pass
finally:
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
"""


def _read(report: bytes, nonce: str, took: float) -> Run:
    try:
        told = json.loads(report.decode("utf-8", errors="replace").splitlines()[0])
        if told["nonce"] != nonce:
            raise ValueError
        return Run(Outcome(told["outcome"]), str(told["detail"])[:300], took)
    except (ValueError, KeyError, IndexError, TypeError):
        return Run(Outcome.NO_VERDICT, "it left before its checks were done", took)


class _Watch:
    """Reads a process's report, and stops it when it takes too long or too much memory."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits, extra_s: float) -> None:
        self.stopped: Outcome | None = None
        self.why = ""
        self._process = process
        self._limits = limits
        self._deadline = time.monotonic() + limits.wall_s + extra_s
        self._done = threading.Event()

    def report(self, job: bytes) -> bytes:
        """Hand over the job; what the process wrote first. More of it is not read."""
        guard = threading.Thread(target=self._guard, daemon=True)
        guard.start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        received = b""
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(job)
                self._process.stdin.close()
            while len(received) < REPORT_BYTES and b"\n" not in received:
                part = self._process.stdout.read1(REPORT_BYTES)
                if not part:
                    break
                received += part
        finally:
            self._done.set()
            guard.join()
        return received

    def _guard(self) -> None:
        while not self._done.wait(POLL_S):
            if time.monotonic() > self._deadline:
                self._stop(Outcome.TIMEOUT, f"{self._limits.wall_s:g} s are over")
            elif (used := _resident_bytes(self._process.pid)) > self._limits.memory_bytes:
                self._stop(Outcome.MEMORY, f"{used >> 20} MiB in all its processes")

    def _stop(self, outcome: Outcome, why: str) -> None:
        if self.stopped is None:
            self.stopped, self.why = outcome, why
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _resident_bytes(pid: int) -> int:
    """Of a process and its descendants."""
    total, left = 0, [pid]
    page = os.sysconf("SC_PAGE_SIZE")
    while left:
        one = left.pop()
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * page
            for task in Path(f"/proc/{one}/task").iterdir():
                left += map(int, (task / "children").read_text().split())
        except (OSError, ValueError, IndexError):
            continue
    return total
