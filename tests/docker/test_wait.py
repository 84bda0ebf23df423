"""How `make up` and the health check take what a server, or none, answers; without an engine."""

import contextlib
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bench.server import free_port

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docker"))

import health  # noqa: E402
import stack  # noqa: E402

REFUSAL = "serve: environment: SERVE_PORT = '0'; must be in 1..65535"


@contextlib.contextmanager
def answering(**status):
    """A server that answers these paths (without the slash), any other with 404; gives the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status.get(self.path[1:], 404))
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """docker(status, exit_status, restarts): a client that knows one container in this state."""

    def use(status, exit_status=0, restarts=0):
        state = {"Status": status, "ExitCode": exit_status}
        labels = {"com.docker.compose.service": "cpu"}
        found = tmp_path / "found.json"
        container = {"Id": "c1", "State": state, "RestartCount": restarts}
        found.write_text(json.dumps([container | {"Config": {"Labels": labels}}]))
        client = tmp_path / "docker"
        client.write_text(
            f'#!/bin/sh\ncase "$1" in\ncontainer) cat {found} ;;\n'
            f'logs) echo "{REFUSAL}" >&2 ;;\n*) exit 1 ;;\nesac\n'
        )
        client.chmod(0o755)
        monkeypatch.setenv("DOCKER", str(client))

    return use


@pytest.mark.parametrize(
    ("status", "exit_status", "words"),
    [("restarting", 2, "exit status 2 and is started again"), ("exited", 0, "exit status 0")],
)
def test_up_does_not_wait_for_a_container_that_ended(
    docker, monkeypatch, capsys, status, exit_status, words
):
    docker(status, exit_status)
    monkeypatch.setattr(stack.time, "sleep", lambda _: pytest.fail("it waits"))
    begin = time.monotonic()
    assert stack.wait_until_ready("127.0.0.1", free_port(), begin, ["c1"]) == 1
    [said, more] = capsys.readouterr().err.splitlines()
    assert said == f"up: cpu ended with {words}: {REFUSAL}"
    assert "`make down`" in more


def test_up_waits_while_the_container_runs_in_its_first_life(docker, monkeypatch, capsys):
    """The pause between two lives may be too short to see; restarts of long ago do not count."""
    docker("running", restarts=7)
    waited = []

    def sleep(_):
        waited.append(True)
        assert len(waited) < 4, "it waits on"
        if len(waited) == 3:
            docker("running", restarts=8)

    monkeypatch.setattr(stack.time, "sleep", sleep)
    assert stack.wait_until_ready("127.0.0.1", free_port(), time.monotonic(), ["c1"]) == 1
    assert len(waited) == 3
    assert f"up: cpu ended and is started again: {REFUSAL}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answers", "ready"),
    [
        ({"readyz": 200}, True),
        ({"readyz": 503, "health": 200}, False),  # the gateway loads an engine
        ({"health": 200}, True),  # vLLM itself, with SERVE_GATEWAY=off
        ({"health": 503}, False),
        ({}, False),
    ],
)
def test_ready_is_the_gateway_s_word_or_vllm_s_own_where_there_is_no_gateway(
    monkeypatch, capsys, answers, ready
):
    with answering(**answers) as port:
        monkeypatch.setenv("SERVE_PORT", str(port))
        monkeypatch.setattr(sys, "argv", ["health.py"])
        assert health.main() == (0 if ready else 1)
        assert stack.ask_ready("127.0.0.1", port)[0] is ready


def test_another_path_is_asked_for_alone(monkeypatch):
    """The router has no /health of a server's."""
    with answering(health=200) as port:
        monkeypatch.setenv("SERVE_PORT", str(port))
        monkeypatch.setattr(sys, "argv", ["health.py", "/readiness"])
        assert health.main() == 1


def test_up_says_that_nothing_was_started(monkeypatch):
    monkeypatch.setattr(stack.engine, "compose", lambda: ["true"])
    known = {"COMPOSE_PROFILES": "bench", "CPU_SERVERS": "0", "PATH": "/usr/bin:/bin"}
    with pytest.raises(stack.engine.DockerError, match="CPU_SERVERS = 0: no container runs"):
        stack.containers(known)
