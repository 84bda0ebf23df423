"""Start what the demo and the measurements need: our server, and `retrofit`'s commands."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bench.server import free_port, log_tail, running_server

PROGRESS_MARK = " passed, "  # in every progress line of retrofit


class StepError(RuntimeError):
    """A command failed; the message carries the end of its output."""


@dataclass(frozen=True)
class Service:
    """What is served and how. capture: the folder for calibration rows."""

    profile: str
    checkpoint: Path
    num_speculative_tokens: int
    log: Path
    start_timeout_s: float
    capture: Path | None = None


Launcher = Callable[[Service], AbstractContextManager[str]]
# run(arguments of `python -m retrofit`, log, say) -> the last line it printed
Retrofit = Callable[[list[str], Path, Callable[[str], None]], str]


@contextlib.contextmanager
def launch_vllm(service: Service) -> Iterator[str]:
    """Run `python -m serve run` on a free port; gives the server's URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "serve", "run", "--profile", service.profile]
    command += ["--port", str(port), "--model", str(service.checkpoint)]
    command += ["--num-speculative-tokens", str(service.num_speculative_tokens)]
    if service.capture is not None:
        command += ["--capture", str(service.capture)]
    with running_server(command, url, service.log, service.start_timeout_s):
        yield url


def run_retrofit(arguments: list[str], log: Path, say: Callable[[str], None]) -> str:
    """Run `python -m retrofit`; its progress is said, everything goes to the log.

    Raises:
        StepError: exit status other than 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last = ""
    command = [sys.executable, "-m", "retrofit", *arguments]
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                file.write(line)
                if PROGRESS_MARK in line:
                    say(f"  {line.strip()}")
                elif line.strip():
                    last = line.strip()
        except BaseException:
            process.terminate()
            raise
        status = process.wait()
    if status:
        raise StepError(f"retrofit {arguments[0]}: exit status {status}; {log}:\n{log_tail(log)}")
    return last
