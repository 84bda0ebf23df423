import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.server import ServerError, free_port, running_server
from tests.serve.front_process import ROOT, is_running, wait_until

# Serves /health with a child beside it, as vLLM has its engine process.
HEALTHY = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def start(code: str, log: Path, timeout_s: float = 60.0):
    port = free_port()
    command = [sys.executable, "-c", code, str(port)]
    return running_server(command, f"http://127.0.0.1:{port}", log, timeout_s)


def wait_until_dead(pid: int) -> None:
    wait_until(lambda: not is_running(pid), "it ends")


def test_the_whole_process_group_is_killed_at_the_end(tmp_path):
    with start(HEALTHY, tmp_path / "log"):
        child = int((tmp_path / "log").read_text().split()[1])
        assert is_running(child)
    wait_until_dead(child)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_group_is_killed_when_the_body_fails(tmp_path, error):
    def fail() -> None:
        with start(HEALTHY, tmp_path / "log"):
            raise error

    with pytest.raises(error):
        fail()
    wait_until_dead(int((tmp_path / "log").read_text().split()[1]))


def test_a_server_that_ends_early_shows_its_status_and_the_end_of_its_log(tmp_path):
    code = "import sys; print('no such model'); sys.exit(3)"
    with (
        pytest.raises(ServerError, match=r"exit status 3(?s:.*)no such model"),
        start(code, tmp_path / "log"),
    ):
        pass


def test_a_server_that_never_answers_is_given_up_and_killed(tmp_path, monkeypatch):
    """After 60 s on a clock by which an hour passes when the server has begun."""

    def now_s() -> float:
        return time.monotonic() + 3600 * bool((tmp_path / "log").read_text())

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    clock = SimpleNamespace(monotonic=now_s, sleep=time.sleep)
    monkeypatch.setattr("bench.server.time", clock)
    with (
        pytest.raises(ServerError, match="no answer within 60 s"),
        start(code, tmp_path / "log"),
    ):
        pass
    wait_until_dead(int((tmp_path / "log").read_text()))


def test_a_port_is_given_once_and_is_none_that_is_listened_on(monkeypatch):
    """Nor given to another process, nor one of those that outgoing connections have."""
    start = free_port()
    assert start < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = taken.getsockname()[1]
        monkeypatch.setattr("bench.server.PORTS", range(busy, busy + 1))
        with pytest.raises(ServerError, match=f"no port of {busy} to {busy} is free"):
            free_port()
    monkeypatch.setattr("bench.server.PORTS", range(start, start + 1))
    with pytest.raises(ServerError, match="is free"):
        free_port()
    code = (
        f"from bench import server; server.PORTS = range({start}, {start + 1}); server.free_port()"
    )
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"no port of {start} to {start} is free" in other.stderr


def test_a_server_that_ignores_term_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.server.STOP_GRACE_S", 0.2)
    code = f"import signal; signal.signal({int(signal.SIGTERM)}, signal.SIG_IGN)\n" + HEALTHY
    with start(code, tmp_path / "log"):
        child = int((tmp_path / "log").read_text().split()[1])
    wait_until_dead(child)
