"""A Docker engine of the tests' own, a base image without a registry, and pip as it is set up here.

Nothing of this machine gets into the repository or an image: pip's settings reach the build as a
secret, its local folders over HTTP on the loopback interface, its CA bundle in the base alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
START_S = 120
# Debian's: a newer client on PATH lacks the builder that Debian's has inside.
DEBIAN_BIN = Path("/usr/bin")
NEEDED = {
    "dockerd": "docker.io",
    f"{DEBIAN_BIN}/docker-compose": "docker-compose",
    "mmdebstrap": "mmdebstrap",
}
NEEDED_GB = 12


class CannotRun(RuntimeError):
    """No engine can run here; the message says what is missing."""


@dataclass(frozen=True)
class OwnEngine:
    """A running engine: its socket's environment for every command."""

    environment: dict[str, str]

    def run(self, *command: str | Path, check: bool = True, timeout: float = 600) -> str:
        """A command's output, standard error behind it."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def docker(self, *arguments: str | Path, check: bool = True, timeout: float = 600) -> str:
        """Output of `docker ARGUMENTS`."""
        return self.run(DEBIAN_BIN / "docker", *arguments, check=check, timeout=timeout)

    def inspect(self, kind: str, name: str) -> dict:
        """What the engine knows of an image or a container."""
        return json.loads(self.docker(kind, "inspect", name))[0]


def check_possible(folder: Path) -> None:
    """Refuse where an engine cannot start, before anything is tried.

    Raises:
        CannotRun: with the reason.
    """
    if os.geteuid() != 0:
        raise CannotRun("an engine needs root")
    missing = [package for tool, package in NEEDED.items() if not find(tool)]
    if missing:
        raise CannotRun(f"not installed: {', '.join(missing)}")
    if (free := shutil.disk_usage(folder).free / 1e9) < NEEDED_GB:
        raise CannotRun(f"{folder} has {free:.0f} GB free; the images need {NEEDED_GB}")


def find(tool: str) -> str | None:
    """A tool on PATH or where Debian puts daemons."""
    return shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@contextlib.contextmanager
def started(folder: Path) -> Iterator[OwnEngine]:
    """Run dockerd in a folder, and end it with all that it holds.

    Raises:
        CannotRun: it does not come up; with the last line of its log.
    """
    socket = f"unix://{folder / 'docker.sock'}"
    environment = {
        **os.environ,
        "DOCKER_HOST": socket,
        "DOCKER_BUILDKIT": "1",
        "DOCKER": str(DEBIAN_BIN / "docker"),
    }
    log = folder / "dockerd.log"
    command = [find("dockerd"), "--host", socket, "--pidfile", folder / "pid"]
    command += ["--data-root", folder / "data", "--exec-root", folder / "exec"]
    with log.open("wb") as output:
        daemon = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    engine = OwnEngine(environment)
    try:
        deadline = time.monotonic() + START_S
        while "Server Version" not in engine.docker("info", check=False):
            if daemon.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace").strip().splitlines() or ["no message"]
                raise CannotRun(f"dockerd does not start: {said[-1]}")
            time.sleep(0.2)
        yield engine
    finally:
        if daemon.poll() is None:
            if containers := engine.docker("ps", "-aq", check=False).split():
                engine.docker("rm", "--force", "--volumes", *containers, check=False)
            daemon.terminate()
            daemon.wait(300)
        shutil.rmtree(folder / "data", ignore_errors=True)


def make_base(engine: OwnEngine, name: str) -> None:
    """Import a minimal Debian as an image; with this machine's CA bundle if it has one.

    Raises:
        CannotRun: no container can be started from it.
    """
    hook = (
        [f"--customize-hook=copy-in {CA_BUNDLE} {CA_BUNDLE.parent}"] if CA_BUNDLE.exists() else []
    )
    make = subprocess.Popen(
        ["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates", *hook]
        + ["bookworm", "-"],
        stdout=subprocess.PIPE,
    )
    with make:
        subprocess.run(
            [DEBIAN_BIN / "docker", "import", "-", name],
            stdin=make.stdout,
            env=engine.environment,
            stdout=subprocess.DEVNULL,
            check=True,
        )
    assert make.returncode == 0
    said = engine.docker("run", "--rm", "--read-only", name, "echo", "it runs", check=False)
    if "it runs" not in said:
        raise CannotRun(f"dockerd starts, but no container: {said.strip().splitlines()[-1:]}")


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder without a line for each request."""

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def pip_settings(path: Path, canary: str) -> Iterator[Path]:
    """Write this machine's pip settings as a pip.conf that works in a build on the host's network.

    Args:
        canary: a text that is in the file and must be nowhere in an image.
    """
    pip = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(pip, capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        found[key.rpartition(".")[2]] = value.strip("'\"")
    lines = ["[global]", f"# {canary}"]
    with contextlib.ExitStack() as stack:
        for key in ("index-url", "extra-index-url", "find-links"):
            kept = []
            for place in found.get(key, "").split():
                folder = Path(place.removeprefix("file://"))
                if place.startswith(("http://", "https://")):
                    kept.append(place)
                elif folder.is_dir():
                    # An index's links lead to folders beside it.
                    kept.append(stack.enter_context(served(folder.parent)) + f"{folder.name}/")
            if kept:
                lines.append(f"{key} = {' '.join(kept)}")
        if CA_BUNDLE.exists():
            lines.append(f"cert = {CA_BUNDLE}")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield path


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on the loopback interface; gives the URL."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def wait_until(
    what: str, check: Callable[[], object], timeout_s: float, poll_s: float = 0.5
) -> float:
    """Poll until `check()` is true; returns the seconds it took."""
    begin = time.monotonic()
    while not check():
        assert time.monotonic() - begin < timeout_s, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(poll_s)
    return time.monotonic() - begin
