"""Life cycle: load, drain, crash, restart; a front in a process, the fake engine behind it."""

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from serve import supervisor as supervisor_module
from serve.stages import Stage
from serve.supervisor import Supervisor
from tests.serve.front_process import WAIT_S, is_running, running_front, wait_until


def test_it_answers_while_the_engine_loads(tmp_path):
    with running_front(tmp_path, [{"gated": True, "shards": 8}]) as front:
        assert front.ask("GET", "/livez")[0] == 200
        seen = wait_until(lambda: front.readiness()["progress"], "progress")
        assert seen["what"] == "Loading safetensors checkpoint shards"
        assert seen["total"] == 8
        status, headers, body = front.ask("GET", "/readyz")
        assert status == 503
        assert int(headers["Retry-After"]) >= 1
        assert json.loads(body)["stage"] == "loading"
        status, headers, body = front.post(events=1)
        assert status == 503
        assert int(headers["Retry-After"]) >= 1
        error = json.loads(body)["error"]
        assert error["code"] == 503
        assert "the engine is not ready: loading" in error["message"]
        front.let_go()
        front.wait_until_ready()
        assert front.post(events=1)[0] == 200
        assert front.ask("GET", "/v1/health/ready")[0] == 200


def drain(front):
    """Ask for the end, and wait until no new work is taken."""
    front.process.send_signal(signal.SIGTERM)
    wait_until(lambda: front.readiness()["stage"] == "draining", "it drains")


def test_sigterm_lets_running_streams_finish_and_takes_no_new_work(tmp_path):
    with running_front(tmp_path, [{}]) as front:
        front.wait_until_ready()
        connection, response = front.begin(events=2, gated=True)
        drain(front)
        status, headers, body = front.post(events=1)
        assert status == 503
        assert int(headers["Retry-After"]) >= 1
        assert "shutting down" in json.loads(body)["error"]["message"]
        front.let_go()
        with contextlib.closing(connection):
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert front.process.wait(WAIT_S) == 0
        assert not is_running(front.lives[0])


def test_a_drain_under_load_loses_no_accepted_request(tmp_path):
    """Each request gets its whole answer, a 503, or no connection at all."""
    outcomes, ending = [], threading.Event()

    def ask_on(front):
        while True:
            late = ending.is_set()
            try:
                status, _, body = front.post(events=5, gap_s=0.02)
            except (OSError, http.client.HTTPException) as error:
                # Once it ends, a connection may be refused, or reset before its first byte is read.
                if not (late and isinstance(error, ConnectionError)):
                    outcomes.append(type(error).__name__)
                return
            whole = status == 503 or body.endswith(b"[DONE]\n\n")
            outcomes.append(f"{status}" if whole else f"cut: {body[-80:]!r}")
            if status == 503:
                return

    with running_front(tmp_path, [{}]) as front:
        front.wait_until_ready()
        threads = [threading.Thread(target=ask_on, args=(front,)) for _ in range(16)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(outcomes) >= len(threads), "it is under load")
        ending.set()
        assert front.terminate() == 0
        for thread in threads:
            thread.join(WAIT_S)
    assert outcomes.count("200") >= 16
    assert set(outcomes) <= {"200", "503"}


def test_what_outlasts_the_grace_is_cut_with_an_error(tmp_path):
    with running_front(tmp_path, [{}], shutdown_timeout=0.3) as front:
        front.wait_until_ready()
        connection, response = front.begin(events=1, end="hang")
        response.readline()
        assert front.terminate() == 1
        with contextlib.closing(connection):
            assert b'"code": 503' in response.read()
        assert "1 request(s) cut off" in front.log()


def test_a_request_that_is_no_work_is_answered_before_the_end_too(tmp_path):
    with running_front(tmp_path, [{}]) as front:
        front.wait_until_ready()
        got = []
        job = {"prefill_steps": 60, "step_s": 0.05, "events": 1}
        asking = threading.Thread(target=lambda: got.append(front.ask("POST", "/tokenize", job)))
        asking.start()
        wait_until(lambda: front.num_begun, "the engine works on it")
        assert front.terminate() == 0
        asking.join(WAIT_S)
        assert got[0][0] == 200


def test_what_an_engine_drops_that_ends_in_a_drain_is_counted(tmp_path):
    with running_front(tmp_path, [{}]) as front:
        front.wait_until_ready()
        connection, response = front.begin(events=2, gated=True)
        drain(front)
        os.kill(front.lives[0], signal.SIGKILL)
        assert front.process.wait(WAIT_S) == 1
        with contextlib.closing(connection):
            assert b'"code": 503' in response.read()


def test_a_second_sigterm_ends_now(tmp_path):
    with running_front(tmp_path, [{}], shutdown_timeout=600) as front:
        front.wait_until_ready()
        connection, _ = front.begin(events=1, end="hang")
        drain(front)
        assert front.terminate() == 1
        connection.close()


def test_an_engine_that_ignores_sigterm_is_killed(tmp_path):
    with running_front(tmp_path, [{"ignore_term": True}]) as front:
        front.wait_until_ready()
        start = time.monotonic()
        assert front.terminate() == 0
        assert time.monotonic() - start > 0.9  # it had the time to end by itself
        assert not is_running(front.lives[0])


def test_sigterm_while_loading_ends_at_once(tmp_path):
    with running_front(tmp_path, [{"load_s": 600}]) as front:
        wait_until(lambda: front.lives, "the engine starts")
        assert front.terminate() == 0  # long before it has loaded


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGRTMIN + 3, "signal 37")]
)
def test_a_killed_engine_is_restarted_and_serves_again(tmp_path, number, name):
    with running_front(tmp_path, [{"forks": True}, {}]) as front:
        front.wait_until_ready()
        [first] = front.lives
        group = [
            int(path.name)
            for path in Path("/proc").iterdir()
            if path.name.isdecimal() and pgrp(int(path.name)) == first
        ]
        assert len(group) == 2
        os.kill(first, number)
        wait_until(lambda: len(front.lives) == 2, "the second life")
        front.wait_until_ready()
        assert front.post(events=1)[0] == 200
        assert front.readiness()["reason"] == f"the engine was ended by {name}"
        assert not any(map(is_running, group))  # what a dead engine left holds GPU memory


def pgrp(pid):
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        return os.getpgid(pid)
    return None


def test_three_ends_in_the_window_are_enough(tmp_path):
    with running_front(tmp_path, [{"crash": "loading"}]) as front:
        wait_until(lambda: front.readiness()["stage"] == "failed", "it gives up")
        assert len(front.lives) == 3
        status, headers, body = front.ask("GET", "/readyz")
        assert status == 503
        assert "Retry-After" not in headers
        reason = "3 ends within 15 minutes; the last: the engine ended with exit status 3"
        assert json.loads(body)["reason"] == reason
        assert reason in json.loads(front.post(events=1)[2])["error"]["message"]
        assert front.ask("GET", "/livez")[0] == 200
        assert front.terminate() == 0


def test_each_restart_waits_twice_as_long(tmp_path):
    limits = {"back_off_s": 0.2, "max_ends": 4}
    with running_front(tmp_path, [{"crash": "loading"}], limits=limits) as front:
        wait_until(lambda: front.readiness()["stage"] == "failed", "it gives up")
        for seconds in ("0.2", "0.4", "0.8"):
            assert f"restart in {seconds} s" in front.log()


def test_a_client_is_told_to_wait_for_the_restart(tmp_path):
    limits = {"back_off_s": 30}
    with running_front(tmp_path, [{}], limits=limits) as front:
        front.wait_until_ready()
        front.post(events=1, end="crash")
        wait_until(lambda: "restart in 30 s" in front.log(), "it waits")
        assert 20 <= int(front.post(events=1)[1]["Retry-After"]) <= 36


def test_the_rest_of_a_stage_is_told_by_the_bar_that_runs(monkeypatch):
    """The draft model's shards come after the target's."""
    now = 1000.0
    monkeypatch.setattr(supervisor_module.time, "monotonic", lambda: now)
    supervisor = Supervisor([], {}, None)
    bar = "Loading safetensors checkpoint shards: | {}/{} [00:00<00:01, 4.00it/s]"
    for done, total, seconds in ((0, 46, 100), (46, 46, 1), (0, 2, 4), (1, 2, 0)):
        supervisor._read([bar.format(done, total).replace(": |", ":  0% |")], supervisor.tail)
        now += seconds
    assert supervisor.stage is Stage.LOADING
    assert supervisor.retry_after_s() == 4


def test_ends_before_the_window_do_not_count(tmp_path):
    """But for those of starts, which test_silence.py has."""
    limits = {"window_s": 0.3, "back_off_s": 0.2}
    with running_front(tmp_path, [{}], limits=limits) as front:
        for life in range(1, 5):
            wait_until(lambda life=life: len(front.lives) == life, "the next life")
            front.wait_until_ready()
            assert front.post(events=1, end="crash")[0] in (200, 503)
        wait_until(lambda: len(front.lives) == 5, "the fifth life")
        front.wait_until_ready()


def test_the_engine_s_output_is_passed_on(tmp_path):
    with running_front(tmp_path, [{}]) as front:
        front.wait_until_ready()
        line = "(Worker pid=1) INFO Starting to load model /model...\n"
        wait_until(lambda: line in front.log(), "it is passed on")
