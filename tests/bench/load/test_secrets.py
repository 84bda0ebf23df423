"""Keys and passwords reach no result and no line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import provenance
from bench.load import behind
from bench.load.cli import main
from bench.load.telemetry import is_local
from bench.server import free_port
from tests.bench.load.fake_server import FakeServer, serving

LISTEN = """
import socket, sys
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("ready", flush=True)
input()
"""


@pytest.fixture
def listen():
    """Starts a program that listens; gives its URL."""
    started = []

    def start(*options: str, program: str | Path = sys.executable) -> str:
        port = free_port()
        command = [program, "-c", LISTEN, str(port), *options]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert started[-1].stdout.readline() == b"ready\n"
        return f"http://127.0.0.1:{port}"

    yield start
    for process in started:
        process.communicate(b"\n", timeout=60)


def test_no_key_of_a_server_is_recorded(listen):
    options = ["--api-key", "k-1", "k-2", "--api_key", "k-3", "--port", "1", "--api_key=k-4"]
    options += ["model", "--hf_token", "k-5"]
    (command,) = behind.describe(listen(*options), Path("/repo"))["commands"]
    assert "k-" not in command.replace("--api-key", "").replace("--api_key", "")
    assert command.endswith(
        "--api-key '***' '***' --api_key '***' --port 1 '--api_key=***' model --hf_token '***'"
    )


def test_the_command_has_no_user_of_a_url():
    command = ["bench", "--url", "http://me:a@b@host:1/x@y", "--url=https://me:secret@host"]
    assert provenance.command_line(command, Path("/repo")) == (
        "bench --url http://host:1/x@y --url=https://host"
    )


def test_no_line_about_a_server_has_the_user_of_its_url(tmp_path, capsys):
    with serving(FakeServer()) as url:
        named = url.replace("://", "://me:secret@")
        assert main(["run", "--url", f"{named}/absent", "--result", str(tmp_path / "a.json")]) == 3
        assert f"{url}/absent/v1/models: HTTP 404" in capsys.readouterr().err
    assert main(["run", "--url", named, "--result", str(tmp_path / "a.json")]) == 3
    said = capsys.readouterr().err
    assert "no server" in said
    assert "secret" not in said


def test_a_url_may_end_in_v1(tmp_path):
    output = tmp_path / "a.json"
    options = ["--depth", "64", "--output", "8", "--repeats", "1", "--max-warm-up-rounds", "0"]
    with serving(FakeServer()) as url:
        assert main(["run", "--url", f"{url}/v1/", *options, "--result", str(output)]) == 0
    assert json.loads(output.read_text())["cells"][0]["num_failed"] == 0


def test_a_tunnel_to_another_machine_is_not_this_one(listen, tmp_path):
    ssh = tmp_path / "ssh"
    ssh.symlink_to(Path(sys.executable).resolve())
    assert is_local(listen())
    assert not is_local(listen(program=ssh))
