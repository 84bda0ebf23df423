"""A link that breaks while two ranks serve: clients may come again, and the next tier serves them.

Real supervisor, gateway and engine; the emulation of the kernel loses what crosses peer memory, and
nothing of what crosses host memory.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading

import pytest

pytest.importorskip("vllm")

from kernels.build import ROOT
from serve.command import vllm_command
from serve.profiles import load_profile
from tests.engine.engine import CHECKPOINT
from tests.engine.test_tensor_parallel import ENV
from tests.kernels.emulated_links import build_emulation
from tests.serve.front_process import Front, answers, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.slow]

START_S = 600  # half a minute on a quiet machine
START_DEADLINE_S = 120  # until the ranks are warm: one of them may begin much later
DEADLINE_S = 10  # a rank of a sound link is never so late, once it serves
STOP_S = 180  # of a hang
JOB = {"model": "dsv4-tiny", "prompt": "The sea", "temperature": 0}
LONG = JOB | {"max_tokens": 3000, "ignore_eos": True}  # what the link does not live to see
PROBE = {"peer-push": "healthy", "peer-pull": "hang", "host-pinned": "healthy"}


class Patient(Front):
    """The first request of a life takes seconds, on two busy cores many."""

    def connect(self, timeout_s=180.0):
        return super().connect(timeout_s)


@pytest.fixture
def front(tmp_path):
    uds, record = tmp_path / "s", tmp_path / "load.json"
    command = vllm_command(load_profile("cpu-tiny"), CHECKPOINT, "", 0, 1, uds=uds)
    command += ["--tensor-parallel-size", "2", "--distributed-executor-backend", "mp"]
    command += ["--worker-cls", "tests.engine.bounded_cpu_worker.Worker", "--dtype", "bfloat16"]
    config = {"command": command, "probe": PROBE, "load_record": str(record)}
    config |= {"limits": {"back_off_s": 0.05}, "monitor_interval_s": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    environment = {
        **os.environ,
        **ENV,
        "DSV4_ALLREDUCE_EAGER_DEADLINE_S": str(DEADLINE_S),
        "DSV4_ALLREDUCE_START_DEADLINE_S": str(START_DEADLINE_S),
        "DSV4_LOAD_RECORD": str(record),
        "EMULATED_FAULT": "lose:60000",  # of the first requests' lines
        "EMULATION": str(build_emulation(tmp_path)),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),  # of the workers, which import a class of the tests
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.serve.front_process", str(tmp_path / "config.json")],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    running = Patient(process, 0, tmp_path)
    listens = tmp_path / "port"
    try:
        wait_until(lambda: listens.exists() or process.poll() is not None, "front listens", START_S)
        assert process.poll() is None, running.log()
        running.port = int(listens.read_text())
        wait_until(lambda: answers(running), "front answers")
        yield running
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        finally:
            process.kill()


def wait_for_life(front, number):
    def is_ready():
        seen = front.readiness()
        return seen["ready"] and seen["lives"] == number

    wait_until(is_ready, f"life {number} is ready", START_S)


def status(front):
    return json.loads(front.ask("GET", "/status.json")[2])


def test_requests_on_a_link_that_breaks_may_come_again_and_are_served_one_tier_down(front):
    wait_for_life(front, 1)
    assert front.post(**JOB, max_tokens=2)[0] == 200
    wait_until(lambda: status(front)["all_reduce"]["tier"] == "peer-push", "the load record")
    got = {}

    def ask(name, **job):
        got[name] = front.post(**job)  # a hang would be a timeout of the client

    threads = [
        threading.Thread(target=ask, args=("whole",), kwargs=LONG),
        threading.Thread(target=ask, args=("stream",), kwargs=LONG | {"stream": True}),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    code, headers, body = got["whole"]
    assert code == 503, body
    assert int(headers["Retry-After"]) >= 1
    assert json.loads(body)["error"]["code"] == 503
    code, _, body = got["stream"]
    assert code == 200
    *before, last = body.decode().removesuffix("\n\n").split("\n\n")
    assert len(before) > 1  # it broke off in the middle
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503

    wait_for_life(front, 2)
    code, _, body = front.post(**JOB, max_tokens=100, ignore_eos=True)
    assert code == 200
    assert json.loads(body)["usage"]["completion_tokens"] == 100
    found = status(front)
    assert found["all_reduce"]["chosen"] == "host-pinned"
    [demoted] = found["all_reduce"]["demoted_from"]
    assert demoted["tier"] == "peer-push"
    said = r"all_reduce_oneshot: rank \d waited \d+\.\d\d s for rank \d: generation \d+, "
    assert re.match(said, demoted["reason"])
    [end] = found["engine"]["ends"]
    assert f"peer-push is demoted to host-pinned: {demoted['reason']}" in end["reason"]
    wait_until(lambda: status(front)["all_reduce"]["tier"] == "host-pinned", "the load record")
    page = front.ask("GET", "/metrics")[2].decode()
    labels = '{from="peer-push",to="host-pinned"}'
    assert f"dsv4_serve_all_reduce_demotions_total{labels} 1.0" in page
