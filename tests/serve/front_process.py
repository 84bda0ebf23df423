"""Our front as a process of its own, with the fake engine behind it.

python -m tests.serve.front_process CONFIG.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_engine.py")
WAIT_S = 60.0  # a hang is bounded; nothing that is waited for takes seconds on a quiet machine
JSON = {"Content-Type": "application/json"}  # vLLM refuses a body of any other type
QUICK = {"back_off_s": 0.05, "stop_s": 1.0, "poll_s": 0.02}


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """Wait for a true value and return it."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
    return value


def is_running(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@dataclasses.dataclass
class Front:
    """A running front and ways to talk to it."""

    process: subprocess.Popen
    port: int
    folder: Path

    def connect(self, timeout_s: float = WAIT_S) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def ask(self, method: str, path: str, body: Any = None, headers: Any = None) -> Any:
        """The whole answer: (status, headers, body)."""
        with contextlib.closing(self.connect()) as connection:
            data = json.dumps(body) if isinstance(body, dict) else body
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def post(self, **job: Any) -> Any:
        return self.ask("POST", "/v1/completions", job, JSON)

    def begin(self, **job: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send a request and read the head of its answer."""
        connection = self.connect()
        connection.request("POST", "/v1/completions", json.dumps(job), JSON)
        return connection, connection.getresponse()

    def readiness(self) -> dict[str, Any]:
        return json.loads(self.ask("GET", "/readyz")[2])

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.readiness()["ready"], "ready")

    @property
    def lives(self) -> list[int]:
        """Process ids of the engine's lives so far."""
        files = sorted((self.folder / "control").glob("life-*"), key=lambda p: int(p.name[5:]))
        return [int(text) for path in files if (text := path.read_text())]

    @property
    def num_begun(self) -> int:
        """Requests for work that have reached the engine."""
        return self._count("begun")

    @property
    def num_aborted(self) -> int:
        return self._count("aborted")

    def _count(self, name: str) -> int:
        path = self.folder / "control" / name
        return len(path.read_text().splitlines()) if path.exists() else 0

    def let_go(self) -> None:
        """Open the gate of the next life that loads, or of the next event."""
        with (self.folder / "control" / "gate").open("a") as file:
            file.write("x")

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def terminate(self, timeout_s: float = WAIT_S) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def running_front(folder: Path, lives: list[dict[str, Any]], **config: Any) -> Iterator[Front]:
    """Start a front whose engine's lives go as told. config: of FrontConfig; limits as a dict."""
    (folder / "control").mkdir()
    limits = QUICK | config.pop("limits", {})
    command = [sys.executable, str(FAKE), "--uds", str(folder / "s"), "--lives", json.dumps(lives)]
    command += ["--control", str(folder / "control")]
    (folder / "config.json").write_text(
        json.dumps({"command": command, "limits": limits, **config})
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.serve.front_process", str(folder / "config.json")],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    front = Front(process, 0, folder)
    listens = folder / "port"
    try:
        wait_until(lambda: listens.exists() or process.poll() is not None, "front listens")
        assert process.poll() is None, front.log()
        front.port = int(listens.read_text())
        wait_until(lambda: answers(front), "front answers")
        yield front
    finally:
        process.kill()
        process.wait()
        for pid in front.lives:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def answers(front: Front) -> bool:
    try:
        return front.ask("GET", "/livez")[0] == 200
    except OSError:
        return False


def tiers_of(folder: Path, arms: dict[str, str], command: list[str], environment: dict[str, str]):
    """Those of two cards of which the probe said `arms`: verdicts by name."""
    from serve.allreduce_tier import AllReduce, Key, Known, Tiers

    key = Key("boot", None, ("0000:01:00.0", "0000:21:00.0"))
    said = {
        "key": {"boot_id": key.boot_id, "driver": key.driver, "bus_ids": list(key.bus_ids)},
        "arms": [{"arm": arm, "verdict": verdict, "reason": ""} for arm, verdict in arms.items()],
    }
    found = AllReduce(folder / "allreduce.json", Known(key, said), "auto", print)
    return Tiers(found, lambda choice: (command, environment | choice.environment))


def main() -> int:
    from serve import front
    from serve.keys import Access, read_keys
    from serve.profiles import load_profile
    from serve.supervisor import Limits

    path = Path(sys.argv[1])
    given = json.loads(path.read_text())
    command = given.pop("command")
    limits = Limits(**given.pop("limits"))
    watch = {"report_dir": path.parent / "reports", "model": "fake"}
    watch = front.WatchConfig(**(watch | given.pop("watch", {})))
    if "keys" in given:
        given["keys"] = read_keys(Path(given["keys"]))
    if "load_record" in given:
        given["load_record"] = Path(given["load_record"])
    for name in ("status_access", "metrics_access"):
        if name in given:
            given[name] = Access(given[name])
    profile = dataclasses.replace(load_profile("cpu-tiny"), **given.pop("profile", {}))
    if "admission" in given:
        given["admission"] = front.AdmissionLimits(**given["admission"])
    environment = dict(os.environ) | {"PYTHONFAULTHANDLER": "1"}
    tiers = None
    if "probe" in given:
        tiers = tiers_of(path.parent, given.pop("probe"), command, environment)
        command, environment = tiers.start(tiers.all_reduce.choice)
    # No other process can have the port: the kernel gives it, to the socket that is served.
    sock = front.listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    config = front.FrontConfig(
        host="127.0.0.1",
        port=port,
        socket_path=path.with_name("s"),
        profile=profile,
        limits=limits,
        watch=watch,
        **given,
    )
    partial = path.with_name("port.partial")
    partial.write_text(str(port))
    partial.replace(path.with_name("port"))
    return front.run(front.serve(config, command, environment, sock, tiers=tiers))


if __name__ == "__main__":
    sys.exit(main())
