import signal
import sys
import time
from pathlib import Path

import pytest

from bench.server import ServerError, free_port, running_server
from tests.serve.front_process import is_running

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


def wait_until_dead(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_the_whole_process_group_is_killed_at_the_end(tmp_path):
    with start(HEALTHY, tmp_path / "log"):
        child = int((tmp_path / "log").read_text().split()[1])
        assert is_running(child)
    assert wait_until_dead(child)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_group_is_killed_when_the_body_fails(tmp_path, error):
    def fail() -> None:
        with start(HEALTHY, tmp_path / "log"):
            raise error

    with pytest.raises(error):
        fail()
    assert wait_until_dead(int((tmp_path / "log").read_text().split()[1]))


def test_a_server_that_ends_early_shows_its_status_and_the_end_of_its_log(tmp_path):
    code = "import sys; print('no such model'); sys.exit(3)"
    with (
        pytest.raises(ServerError, match=r"exit status 3(?s:.*)no such model"),
        start(code, tmp_path / "log"),
    ):
        pass


def test_a_server_that_never_answers_is_given_up_and_killed(tmp_path):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with (
        pytest.raises(ServerError, match="no answer within 3 s"),
        start(code, tmp_path / "log", timeout_s=3.0),
    ):
        pass
    assert wait_until_dead(int((tmp_path / "log").read_text()))


def test_a_server_that_ignores_term_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.server.STOP_GRACE_S", 0.2)
    code = f"import signal; signal.signal({int(signal.SIGTERM)}, signal.SIG_IGN)\n" + HEALTHY
    with start(code, tmp_path / "log"):
        child = int((tmp_path / "log").read_text().split()[1])
    assert wait_until_dead(child)
