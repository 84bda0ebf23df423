"""The whole front over the patched CPU engine and the tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anthropic
import openai
import pytest

from bench.server import free_port
from serve.evidence import group_members
from serve.stages import Lines, Stage, read_line
from tests.serve.front_process import Front, answers, wait_until

ROOT = Path(__file__).parents[2]
MODEL = "dsv4-tiny"
START_S = 600
STALL_S = 5

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    port = free_port()
    command = [sys.executable, "-m", "serve", "run", "--profile", "cpu-tiny", "--port", str(port)]
    command += ["--stall-timeout", str(STALL_S), "--report-dir", str(folder / "reports")]
    command += ["--load-record", str(folder / "load.json"), "--shutdown-timeout", str(START_S)]
    with (folder / "log").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    running = Front(process, port, folder)
    try:
        wait_until(lambda: answers(running) or process.poll() is not None, "it listens", START_S)
        assert process.poll() is None, running.log()
        yield running
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def ready(front):
    """The front once its engine answers."""
    wait_until(lambda: front.readiness()["ready"], "ready", START_S)
    return front


@pytest.fixture
def client(front):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{front.port}/v1", api_key="x", max_retries=0, timeout=60
    ) as client:
        yield client


def core(front):
    """Process ids of the engine's children, which hold the model."""
    [leader] = {os.getpgid(pid) for pid in children(front.process.pid)}
    return [pid for pid in group_members(leader) if pid != leader]


def children(pid):
    return [
        int(child)
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if os.getpgid(int(child)) != os.getpgid(pid)
    ]


def test_stages_are_seen_while_it_loads(front):
    stages = []

    def is_ready():
        seen = front.readiness()
        if not stages or stages[-1] != seen["stage"]:
            stages.append(seen["stage"])
        return seen["ready"]

    wait_until(is_ready, "ready", START_S)
    assert stages[0] == "starting"
    assert stages[-1] == "ready"
    # Some last so short that nobody need see them there; what vLLM says of them is in the log.
    lines = Lines().feed(f"{front.log()}\n".encode())
    said = [seen for line in lines if (seen := read_line(line))]
    assert {stage for stage, _ in said} >= {Stage.LOADING, Stage.PREPARING, Stage.LISTENING}
    assert any(progress for _, progress in said)
    assert set(stages) <= {stage.value for stage in Stage}


def test_the_openai_and_anthropic_clients_work_through_it(ready, client):
    asked = {"model": MODEL, "prompt": "The sea", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=1)
    assert whole.usage.completion_tokens == 12
    assert len(whole.choices[0].logprobs.tokens) == 12
    parts = [event.choices[0].text for event in client.completions.create(**asked, stream=True)]
    assert len(parts) > 1
    assert "".join(parts) == whole.choices[0].text
    several = client.completions.create(**(asked | {"temperature": 1}), n=3, stop=["zzz"])
    assert len(several.choices) == 3
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "The sea"}],
        max_tokens=5,
        temperature=0,  # hot, its end may be the first token
    )
    assert chat.choices[0].finish_reason == "length"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(**(asked | {"model": "other"}))
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**(asked | {"max_tokens": 10**6}))
    with (
        anthropic.Anthropic(
            base_url=f"http://127.0.0.1:{ready.port}", api_key="x", max_retries=0
        ) as other,
        other.messages.stream(
            model=MODEL,
            max_tokens=5,
            messages=[{"role": "user", "content": "The sea"}],
            extra_body={"temperature": 0},
        ) as stream,
    ):
        assert stream.get_final_message().usage.output_tokens == 5


def test_a_stopped_engine_core_is_noticed_dumped_and_replaced(ready, client):
    """vLLM's own /health says 200 for as long as this lasts."""
    stopped = core(ready)
    events = client.completions.create(
        model=MODEL, prompt="The", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    next(events)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(openai.APIError, match="the engine ended"):
        for _ in events:
            pass
    assert time.monotonic() - start < 12 * STALL_S  # by default it would be 120 s
    wait_until(lambda: list((ready.folder / "reports").glob("*.json")), "the report")
    [report] = (ready.folder / "reports").iterdir()
    text = report.read_text()
    assert "most recent call first" in text
    assert "/v1/completions" in text


def test_the_next_life_serves(ready, client):
    assert ready.readiness()["lives"] == 2
    [report] = (ready.folder / "reports").iterdir()
    first = {process["pid"] for process in json.loads(report.read_text())["processes"]}
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in first)
    done = client.completions.create(model=MODEL, prompt="The sea", max_tokens=2, temperature=0)
    assert done.usage.completion_tokens == 2


def test_a_drain_lets_the_stream_finish_and_ends_every_process(ready, client):
    processes = [*children(ready.process.pid), *core(ready)]
    events = client.completions.create(
        model=MODEL, prompt="The", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    )
    next(events)
    ready.process.send_signal(signal.SIGTERM)
    *_, last = events
    assert last.choices[0].finish_reason == "length"
    assert ready.process.wait(START_S) == 0
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in processes)
