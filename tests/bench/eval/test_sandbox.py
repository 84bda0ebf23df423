"""Programs that mean harm: contained, reported, and the machine is as it was."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from bench.eval import sandbox as sandbox_module
from bench.eval.sandbox import Limits, Outcome, Sandbox, find, user_of
from bench.load.errors import LoadError

LIMITS = Limits(wall_s=60.0, cpu_s=3, memory_bytes=256 << 20, disk_bytes=8 << 20, processes=6)
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n"
FORGED = """
import json, os
for fd in range(3, 20):
    try:
        told = json.dumps({"nonce": "x", "outcome": "passed", "detail": ""})
        os.write(fd, told.encode() + b"\\n")
    except OSError:
        pass
os._exit(0)
"""

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None and "CI" not in os.environ, reason="needs bubblewrap"
)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return find(limits=LIMITS)


FUTURE = """from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar

@dataclass
class Step:
    size: int
    least: ClassVar[int] = 1

def f(x):
    return x + Step(1).size
"""
PASSES_ITSELF = "import __main__\n__main__.tell('passed', '')\n"
CHANGES_ITS_CHECK = """
import __main__
__main__.job["check"] = "def check(candidate): pass"
def f(x):
    return 0
"""
SAYS_PASSED = """
import json
dumps = json.dumps
json.dumps = lambda told: dumps({**told, "outcome": "passed"})
def f(x):
    return 0
"""


def contents(source: str) -> str:
    """A program that puts what it saw into the exception it ends with."""
    return f"import os, sys\nseen = None\n{source}\nraise SystemExit(repr(seen))\n"


@pytest.mark.parametrize(
    "source", ["def f(x):\n    return x + 1\n", FUTURE], ids=["plain", "looks its module up"]
)
def test_a_right_program_passes(sandbox, source):
    run = sandbox.run(source, CHECK, "f")
    assert run.outcome is Outcome.PASSED, run


@pytest.mark.parametrize(
    "source",
    [PASSES_ITSELF, CHANGES_ITS_CHECK, SAYS_PASSED],
    ids=["tells", "changes its check", "changes the verdict"],
)
def test_the_verdict_is_not_reached_by_an_import(sandbox, source):
    assert sandbox.run(source, CHECK, "f").outcome is Outcome.FAILED


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("def f(x):\n    return x\n", "AssertionError"),
        ("def f(x):\n    return y\n", "NameError"),
        ("def f(x)\n", "SyntaxError"),
        ("def g(x):\n    return x\n", "KeyError"),
        ("import sys\nsys.exit(0)\n", "SystemExit"),
        ("def f(x):\n    return f(x)\n", "RecursionError"),
        ("raise KeyboardInterrupt\n", "KeyboardInterrupt"),
    ],
)
def test_a_wrong_program_fails(sandbox, source, detail):
    run = sandbox.run(source, CHECK, "f")
    assert run.outcome is Outcome.FAILED, run
    assert detail in run.detail


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)\n",
        "import os\nprint('passed')\nos._exit(0)\n",
        FORGED,
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n",
        "import ctypes\nctypes.string_at(0)\n",
    ],
    ids=["exit", "prints passed", "writes a verdict", "kills itself", "crashes"],
)
def test_leaving_before_the_checks_is_no_pass(sandbox, source):
    run = sandbox.run(source, CHECK, "f")
    assert run.outcome is Outcome.NO_VERDICT, run


@pytest.mark.parametrize(
    "source",
    [
        "while True:\n    pass\n",
        "import time\ntime.sleep(3600)\n",
        "input()\nwhile True: print(1)\n",
    ],
    ids=["loop", "sleep", "prints"],
)
def test_a_program_that_does_not_end_is_stopped(sandbox, source):
    started = time.monotonic()
    run = replace(sandbox, limits=replace(LIMITS, wall_s=6.0)).run(source, CHECK, "f")
    assert run.outcome in (Outcome.TIMEOUT, Outcome.NO_VERDICT, Outcome.FAILED), run
    assert time.monotonic() - started < 60  # it would sleep for an hour


def test_a_sleeper_is_reported_as_a_timeout(sandbox):
    quick = replace(sandbox, limits=replace(LIMITS, wall_s=1.0))
    assert quick.run("import time\ntime.sleep(3600)\n").outcome is Outcome.TIMEOUT


def test_memory_is_limited(sandbox):
    run = sandbox.run("a = []\nwhile True:\n    a.append(bytearray(1 << 20))\n", CHECK, "f")
    assert run.outcome is Outcome.MEMORY, run


def test_memory_is_limited_over_all_processes(sandbox):
    source = (
        "import os, time\n"
        "for _ in range(4):\n"
        "    if os.fork() == 0:\n"
        "        keep = b'x' * (150 << 20)\n"
        "        time.sleep(60)\n"
        "time.sleep(60)\n"
    )
    run = sandbox.run(source, CHECK, "f")
    assert run.outcome is Outcome.MEMORY, run


def test_forks_without_end_are_contained(sandbox):
    before = processes()
    run = sandbox.run("import os\nwhile True:\n    os.fork()\n", CHECK, "f")
    assert run.outcome in (Outcome.FAILED, Outcome.NO_VERDICT, Outcome.TIMEOUT), run
    wait_for(lambda: not (processes() - before))


def test_programs_that_run_at_once_do_not_share_a_limit(sandbox):
    source = (
        "import os, time\n"
        "for _ in range(4):\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(1)\n"
        "        os._exit(0)\n"
        "for _ in range(4):\n"
        "    os.wait()\n"
        "def f(x):\n    return x + 1\n"
    )
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: sandbox.run(source, CHECK, "f"), range(3)))
    assert [run.outcome for run in runs] == [Outcome.PASSED] * 3, runs


def test_children_die_with_the_program(sandbox):
    before = processes()
    source = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(3600)\n"
        "def f(x):\n    return x + 1\n"
    )
    assert sandbox.run(source, CHECK, "f").outcome is Outcome.PASSED
    wait_for(lambda: not (processes() - before))


@pytest.mark.parametrize("place", ["/tmp", "/dev/shm", "/", "/var/tmp", "/proc"])
def test_the_disk_is_limited_and_nothing_else_is_written(sandbox, place):
    source = contents(
        f"seen = 0\ntry:\n    for i in range(64):\n"
        f"        with open({place!r} + f'/fill{{i}}', 'wb') as file:\n"
        f"            for _ in range(4):\n                seen += file.write(bytes(1 << 20))\n"
        f"                file.flush()\n"
        f"except OSError as error:\n    pass"
    )
    run = sandbox.run(source)
    written = int(run.detail.removeprefix("SystemExit: "))
    assert written <= LIMITS.disk_bytes + (1 << 20)
    assert (written > 0) == (place == "/tmp")
    assert not Path(place, "fill0").exists()


def test_no_file_of_this_machine_is_read(sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    tmp_path.chmod(0o755)
    source = contents(
        f"seen = []\nfor path in ({str(secret)!r}, {__file__!r}, '/etc/passwd', '/etc/shadow',\n"
        f"        '/proc/1/environ', os.path.expanduser('~/.bashrc'), '/root/.bashrc'):\n"
        f"    try:\n        if open(path).read(): seen.append(path)\n    except OSError: pass"
    )
    run = sandbox.run(source)
    # Process 1 inside is the sandbox's own, with an environment of its own.
    assert run.detail in ("SystemExit: []", "SystemExit: ['/proc/1/environ']"), run


def test_the_environment_is_empty(sandbox, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    run = sandbox.run(contents("seen = sorted(os.environ.items())"))
    assert "HOME" in run.detail, run
    assert "s3cret" not in run.detail


def test_nothing_outside_is_written(sandbox, tmp_path):
    target = tmp_path / "written"
    tmp_path.chmod(0o777)
    source = contents(
        f"for path in ({str(target)!r}, '/usr/bin/written', {sys.base_prefix + '/written'!r},\n"
        f"        '/dev/written', '/etc/written'):\n"
        f"    try:\n        os.makedirs(os.path.dirname(path), exist_ok=True)\n"
        f"        open(path, 'w').write('x')\n        seen = path\n    except OSError: pass"
    )
    # A folder of this name can be made in the sandbox's own /tmp.
    assert sandbox.run(source).detail == f"SystemExit: {str(target)!r}"
    assert not target.exists()
    assert not Path(sys.base_prefix, "written").exists()


def test_there_is_no_network(sandbox):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        source = contents(
            f"import urllib.request\ntry:\n"
            f"    seen = urllib.request.urlopen('http://127.0.0.1:{server.server_port}/x').status\n"
            f"except OSError as error:\n    seen = 'no network'"
        )
        run = sandbox.run(source)
    finally:
        server.shutdown()
        server.server_close()
    assert run.detail == "SystemExit: 'no network'"
    assert not asked


def test_without_a_layer_it_refuses(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(LoadError, match=r"not run without a sandbox: bwrap is not installed"):
        find()
    with pytest.raises(LoadError, match="podman is not installed.*docker is not installed"):
        find(image="python:3.11-slim")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--share-net"], "has a network"),
        (
            ["--chmod", "0755", "/etc", "--ro-bind", "/etc/passwd", "/etc/passwd"],
            "reads /etc/passwd",
        ),
        (["--perms", "0777", "--tmpfs", "/dev/shm"], "writes to /dev/shm"),
    ],
)
def test_a_layer_that_does_not_keep_its_promise_is_refused(monkeypatch, options, problem):
    arguments = Sandbox.arguments

    def weakened(self, name):
        kept = arguments(self, name)
        if options == ["--share-net"]:
            kept.remove("--unshare-net")
            return kept
        at = kept.index("--remount-ro")
        return kept[:at] + options + kept[at:]

    monkeypatch.setattr(Sandbox, "arguments", weakened)
    with pytest.raises(LoadError, match=problem):
        find(limits=LIMITS)


def test_a_layer_without_limits_is_refused(monkeypatch, tmp_path):
    program = tmp_path / "inside.py"
    program.write_text(sandbox_module.PROGRAM.read_text().replace("(resource.RLIMIT_NPROC", "#"))
    monkeypatch.setattr(sandbox_module, "PROGRAM", program)
    with pytest.raises(LoadError, match="processes are not limited"):
        find(limits=LIMITS)


def test_a_container_gets_the_same_limits():
    command = Sandbox("container", "docker", "python:3.11-slim", LIMITS).arguments("name")
    user = user_of("name")
    assert user in sandbox_module.USERS
    for option, value in (
        ("--network", "none"), ("--cap-drop", "ALL"), ("--memory", str(256 << 20)),
        ("--pids-limit", "8"), ("--pull", "never"), ("--user", f"{user}:{user}"),
    ):  # fmt: skip
        assert command[command.index(option) + 1] == value
    assert "--read-only" in command


def processes() -> set[int]:
    """Of this machine, all that run our program inside a sandbox."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    lines = [line.split(None, 1) for line in listed.stdout.splitlines()[1:]]
    return {int(pid) for pid, text in lines if "What runs inside the sandbox" in text}


def wait_for(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
