"""An engine, a base and the images, once for all tests of this folder."""

import json
import secrets
import sys
import time

import pytest

from tests.docker import own_engine
from tests.docker.own_engine import ROOT, CannotRun, OwnEngine

BASE = "dsv4-test/base:1"


@pytest.fixture(scope="session")
def say(pytestconfig):
    """say(line): print past pytest's capture, because these tests take minutes."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def write(line):
        with capture.global_and_fixture_disabled():
            print(f"  docker: {line}", flush=True)

    return write


@pytest.fixture(scope="session")
def canary():
    """A text in the build's secret that must be nowhere in an image."""
    return f"canary-{secrets.token_hex(12)}"


@pytest.fixture(scope="session")
def engine(tmp_path_factory, canary, say):
    """An engine with a base image and pip's settings; skipped, with the reason, where none runs."""
    folder = tmp_path_factory.mktemp("docker")
    try:
        own_engine.check_possible(folder)
        with (
            own_engine.started(folder) as started,
            own_engine.pip_settings(folder / "pip.conf", canary) as settings,
        ):
            begin = time.monotonic()
            own_engine.make_base(started, BASE)
            say(f"base image: {time.monotonic() - begin:.0f} s")
            flags = f"--network host --progress=plain --secret id=pip,src={settings}"
            flags += f" --build-arg CPU_BASE={BASE} --build-arg GPU_BASE={BASE}"
            added = {"BASE": BASE, "TORCH_CPU_INDEX": "", "DOCKER_BUILD_FLAGS": flags}
            yield OwnEngine(started.environment | added)
    except CannotRun as error:
        say(f"NOT TESTED, NO ENGINE CAN START: {error}")
        pytest.skip(f"no Docker engine: {error}")


@pytest.fixture(scope="session")
def build(engine, tmp_path_factory, say):
    """build(target) -> what docker/image.py reports of it; each target is built once."""
    built = {}

    def make(target):
        if target not in built:
            path = tmp_path_factory.mktemp("report") / "image.json"
            engine.run(sys.executable, "docker/image.py", target, "--report", path, timeout=900)
            built[target] = json.loads(path.read_text())
            size, times = built[target]["size_bytes"] / 1e6, built[target]
            say(f"{target}: {size:.0f} MB, {times['build_s']} s, again {times['rebuild_s']} s")
        return built[target]

    return make


@pytest.fixture(scope="session")
def bill_folder():
    """Where docker/image.py puts the bills of material."""
    return ROOT / "build" / "sbom"
