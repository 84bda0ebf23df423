"""The watchdog, against an engine that stalls in every way, and against one that is only slow."""

import contextlib
import json
import os
import re
import signal
import socket
import time

import pytest

from serve import evidence
from serve.watchdog import read_progress
from tests.serve.front_process import WAIT_S, running_front, wait_until

STALL_S = 1.0
WATCH = {"stall_timeout_s": STALL_S, "canary_interval_s": 600}


@pytest.fixture
def watched(tmp_path):
    with running_front(tmp_path, [{}], watch=WATCH) as front:
        front.wait_until_ready()
        yield front


def report(front):
    [path] = (front.folder / "reports").iterdir()
    return json.loads(path.read_text())


@pytest.mark.parametrize("job", [{"wedge": True}, {"events": 2, "end": "hang"}])
def test_a_stalled_engine_is_dumped_ended_and_replaced(watched, job):
    """In prefill and in the middle of a stream. The request gets its error."""
    [first] = watched.lives
    status, headers, body = watched.post(**job)  # within WAIT_S; its job alone would never end
    assert b"the engine ended while it worked on this request" in body
    assert status == (503 if job.get("wedge") else 200)
    wait_until(lambda: len(watched.lives) == 2, "the second life")
    watched.wait_until_ready()
    assert watched.post(events=1)[0] == 200
    said = r"the engine made no progress for \d+ s while 1 request\(s\)"
    assert re.search(said, watched.readiness()["reason"])
    found = report(watched)
    assert [process["pid"] for process in found["processes"]] == [first]
    stacks = "\n".join(found["stacks"])
    assert "fake_engine.py" in stacks
    assert "most recent call first" in stacks or "Thread" in stacks
    assert found["requests"][0]["path"] == "/v1/completions"


def test_a_stopped_engine_is_noticed(watched):
    """SIGSTOP: its sockets accept, nothing answers, not even /metrics."""
    os.kill(watched.lives[0], signal.SIGSTOP)
    status, _, _ = watched.post(events=1)
    assert status == 503
    wait_until(lambda: len(watched.lives) == 2, "the second life")
    watched.wait_until_ready()
    assert watched.post(events=1)[0] == 200


def test_a_long_prefill_is_no_stall(watched):
    """Four times the bound without a byte, but the engine steps."""
    status, _, body = watched.post(prefill_steps=20, step_s=0.2, events=1)
    assert status == 200
    assert body.endswith(b"[DONE]\n\n")
    assert len(watched.lives) == 1


def test_a_prefill_that_moves_the_kv_cache_alone_is_no_stall(watched):
    """What vLLM does: its steps are not counted until the first token."""
    status, _, _ = watched.post(prefill_steps=20, step_s=0.2, uncounted=True, events=1)
    assert status == 200
    assert len(watched.lives) == 1


def test_a_kernel_that_is_compiled_at_its_first_use_is_no_stall(watched):
    """Four times the bound without a step, while a compiler works."""
    assert watched.post(jit_s=4 * STALL_S, events=1)[0] == 200
    assert len(watched.lives) == 1


def test_compilers_that_find_no_end_are_a_stall(tmp_path):
    watch = WATCH | {"start_stall_timeout_s": 3 * STALL_S}
    with running_front(tmp_path, [{}], watch=watch) as front:
        front.wait_until_ready()
        start = time.monotonic()
        assert front.post(jit_s=600, events=1)[0] == 503
        assert time.monotonic() - start > 3 * STALL_S
        wait_until(lambda: len(front.lives) == 2, "the second life")


def test_a_client_that_sends_or_reads_slowly_is_no_stall(watched):
    with socket.create_connection(("127.0.0.1", watched.port), timeout=WAIT_S) as sender:
        sender.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        reader, _ = watched.begin(events=30, size=2**20)
        time.sleep(3 * STALL_S)
        reader.close()
    assert len(watched.lives) == 1
    assert watched.readiness()["ready"]


def test_an_idle_engine_is_no_stall(watched):
    quick = {"prefill_steps": 1, "step_s": STALL_S / 4, "events": 1}  # a look falls into it
    watched.post(**quick)
    time.sleep(3 * STALL_S)
    assert watched.post(**quick)[0] == 200
    assert len(watched.lives) == 1


def test_an_idle_engine_that_is_wedged_is_noticed_by_a_canary(tmp_path):
    watch = {"stall_timeout_s": STALL_S, "canary_interval_s": 0.5}
    with running_front(tmp_path, [{"wedged": True}, {}], watch=watch) as front:
        wait_until(lambda: len(front.lives) == 2, "the second life")
        front.wait_until_ready()
        assert "while a test request waited" in front.readiness()["reason"]
        time.sleep(3 * STALL_S)
        assert len(front.lives) == 2  # canaries of a sound engine raise no alarm


def test_no_canary_flies_while_a_request_runs(tmp_path):
    watch = {"stall_timeout_s": 4, "canary_interval_s": 0.2}  # looks at it each half second
    with running_front(tmp_path, [{}], watch=watch) as front:
        front.wait_until_ready()
        connection, response = front.begin(events=20, gap_s=0.1)
        for _ in range(6):  # by the third event a canary from before it has landed
            response.readline()
        canaries = front.folder / "control" / "canaries"
        before = canaries.stat().st_size if canaries.exists() else 0
        with contextlib.closing(connection):
            response.read()
        after = canaries.stat().st_size if canaries.exists() else 0
        assert after == before
        wait_until(canaries.exists, "a canary when idle")


def test_three_stalls_are_enough(tmp_path):
    watch = {"stall_timeout_s": 0.3, "canary_interval_s": 0.1}
    with running_front(tmp_path, [{"wedged": True}], watch=watch) as front:
        wait_until(lambda: front.readiness()["stage"] == "failed", "it gives up")
        assert len(front.lives) == 3
        assert "made no progress" in front.readiness()["reason"]
        assert len(list((front.folder / "reports").iterdir())) >= 1


def test_only_the_samples_of_progress_are_compared():
    page = (
        "# HELP vllm:iteration_tokens_total_count x\n"
        'vllm:iteration_tokens_total_count{engine="0"} 3.0\n'
        'vllm:generation_tokens_total_created{engine="0"} 1.7e9\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.5\n'
        'vllm:num_requests_running{engine="0"} 1.0\n'
    )
    assert read_progress(page) == (
        'vllm:iteration_tokens_total_count{engine="0"} 3.0',
        'vllm:kv_cache_usage_perc{engine="0"} 0.5',
    )


def test_keys_do_not_reach_a_report(monkeypatch):
    environment = {"VLLM_API_KEY": "x", "NCCL_DEBUG": "INFO", "HF_TOKEN": "y", "VLLM_PORT": "1"}
    raw = "\0".join(f"{name}={value}" for name, value in environment.items()).encode()
    monkeypatch.setattr(evidence.Path, "read_bytes", lambda _: raw)
    assert evidence.shown_environment(1) == {"NCCL_DEBUG": "INFO", "VLLM_PORT": "1"}
