"""Who answers at a port of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.load import behind
from bench.server import free_port

# Listens, and has a child with a variable of its own, as `serve` has the engine.
SERVER = """
import os, socket, subprocess, sys
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
child = subprocess.Popen(
    [sys.executable, sys.argv[2], "--api-k=secret-2", "/opt/some/model"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"NCCL_P2P_DISABLE": "1"},
)
child.stdout.readline()
print("ready", flush=True)
input()
child.communicate(b"\\n")
"""


ENGINE = "print(flush=True); input()"


@pytest.fixture
def listening(tmp_path):
    """A port with a server behind it, its process, and what it was started with."""
    port = free_port()
    server, engine = tmp_path / "server.py", tmp_path / "engine.py"
    server.write_text(SERVER)
    engine.write_text(ENGINE)
    variables = {"NCCL_P2P_DISABLE": "0", "VLLM_CACHE_ROOT": "/home/somebody/cache",
                 "VLLM_API_KEY": "secret-3", "UNRELATED": "x"}  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, server, str(port), engine, "--api-key", "secret-1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | variables,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == b"ready\n"
        yield port, process
    finally:
        process.communicate(b"\n", timeout=60)


def test_commands_and_variables_are_those_of_the_listener_and_its_engine(listening):
    port, _ = listening
    seen = behind.describe(f"http://127.0.0.1:{port}", Path("/repo"))
    assert seen["commands"] == [
        f"python server.py {port} engine.py --api-key '***'",
        "python engine.py '--api-k=***' model",
    ]
    assert seen["environment"]["NCCL_P2P_DISABLE"] == "1"  # the child's
    assert seen["environment"]["VLLM_CACHE_ROOT"] == "cache"
    assert not {"VLLM_API_KEY", "UNRELATED"} & set(seen["environment"])
    assert "secret" not in json.dumps(seen)
    assert seen["image"] is None


def test_nobody_behind_a_port_is_none():
    assert behind.describe(f"http://127.0.0.1:{free_port()}", Path("/repo")) is None


def test_the_image_of_the_container_that_publishes_the_port_is_named(
    listening, tmp_path, monkeypatch
):
    """Docker is a script with the answers of one; the container's process is a real one."""
    port, process = listening
    container = {
        "State": {"Pid": process.pid},
        "Image": "sha256:i",
        "Config": {
            "Image": "dsv4-maxq:gpu",
            "Env": ["NCCL_DEBUG=WARN", "NCCL_P2P_DISABLE=9"],
            "Labels": {"org.opencontainers.image.revision": "abc"},
        },
    }
    image = {"RepoDigests": ["dsv4-maxq@sha256:d"]}
    docker = tmp_path / "docker"
    docker.write_text(f"""#!/bin/sh
case "$*" in
  "ps --quiet --no-trunc --filter publish={port}") echo c1 ;;
  "inspect c1") echo '{json.dumps([container])}' ;;
  "image inspect sha256:i") echo '{json.dumps([image])}' ;;
  *) exit 1 ;;
esac
""")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    seen = behind.describe(f"http://127.0.0.1:{port}", Path("/repo"))
    assert seen["image"] == {
        "name": "dsv4-maxq:gpu", "id": "sha256:i", "digests": ["dsv4-maxq@sha256:d"],
        "revision": "abc",
    }  # fmt: skip
    assert seen["environment"]["NCCL_DEBUG"] == "WARN"
    assert seen["environment"]["NCCL_P2P_DISABLE"] == "1"  # the process knows better
