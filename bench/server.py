"""Run a server as a child process group: start, wait until it answers, always kill."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

LOG_TAIL_LINES = 20
POLL_S = 0.25
STOP_GRACE_S = 15.0
PORTS = range(20_000, 30_000)  # below those of outgoing connections, 32768 and more
_claims: list[socket.socket] = []


class ServerError(RuntimeError):
    """The server did not come up, or went away."""


def free_port() -> int:
    """Return a TCP port that nothing on the loopback interface listens on, nor soon will.

    A server may take a minute until it binds its port. So it is none of those that Linux gives to
    whoever asks for any, and while this process lives no other caller of this function is given it.

    Raises:
        ServerError: all of PORTS are taken.
    """
    for port in random.sample(PORTS, len(PORTS)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0dsv4-maxq-port-{port}")  # of no file: gone with its process
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return port
    raise ServerError(f"server: no port of {PORTS.start} to {PORTS.stop - 1} is free")


def log_tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines of a log file."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


@contextlib.contextmanager
def running_server(
    command: Sequence[str], base_url: str, log: Path, timeout_s: float
) -> Iterator[None]:
    """Start `command`, wait for GET /health, and kill its whole process group at the end.

    Raises:
        ServerError: the process ended, or did not answer within `timeout_s`; carries the end of
            the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_healthy(process, base_url, log, timeout_s)
            yield
        finally:
            _stop(process)


def _wait_until_healthy(
    process: subprocess.Popen[bytes], base_url: str, log: Path, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while not _is_healthy(base_url):
        if (status := process.poll()) is not None:
            raise ServerError(f"server: ended with exit status {status}; {log}:\n{log_tail(log)}")
        if time.monotonic() > deadline:
            raise ServerError(
                f"server: no answer within {timeout_s:.0f} s; {log}:\n{log_tail(log)}"
            )
        time.sleep(POLL_S)


def _is_healthy(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """TERM the group, wait for its leader, KILL what is left. The group's id is the leader's."""
    _signal_group(process.pid, signal.SIGTERM)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_GRACE_S)
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
