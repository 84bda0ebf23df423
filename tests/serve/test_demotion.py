"""An engine that its all-reduce ended starts again one tier down; all other ends change nothing."""

import asyncio
import json
import os
import sys
import time

import pytest

from kernels.allreduce import Expired
from serve import supervisor as supervisor_module
from serve.allreduce_tier import AllReduce, Key, Known, Tier, Tiers
from serve.faults import FaultKind, Faults
from serve.stages import Stage
from serve.supervisor import Limits, Supervisor
from tests.serve.front_process import QUICK, WAIT_S, running_front, wait_until

KEY = Key("boot", None, ("0000:01:00.0", "0000:21:00.0"))
PROBE = {"peer-push": "healthy", "peer-pull": "hang", "host-pinned": "healthy"}
EXPIRED = str(Expired(0, 1, 1, 4, 4, (2, 2), 0, 0, 8192, 2.0))
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
# Each life notes the tier in its command and in its environment, then does as PLAN says.
ENGINE = """
import json, os, subprocess, sys, time
path, tier = sys.argv[1:]
with open(path, "a") as file:
    print(tier, os.environ["DSV4_ALLREDUCE_TIER"], file=file)
plan = json.loads(os.environ["PLAN"])
life = len(open(path).readlines()) - 1
exec(plan[min(life, len(plan) - 1)])
"""
FAULT = f"print({EXPIRED!r}); sys.exit(1)"


class Lives:
    """A supervisor over lives of `plan`, of two cards of which the probe said `arms`."""

    def __init__(self, folder, plan, arms=PROBE, override="auto", echo=lambda data: None):
        said = {
            "key": {"boot_id": KEY.boot_id, "driver": None, "bus_ids": list(KEY.bus_ids)},
            "arms": [{"arm": a, "verdict": verdict, "reason": ""} for a, verdict in arms.items()],
        }
        self.path = folder / "lives"
        self.faults = Faults()
        link = AllReduce(folder / "allreduce.json", Known(KEY, said), override, print)
        self.link = link
        base = dict(os.environ) | {"PLAN": json.dumps(plan)}

        def start(choice):
            command = [sys.executable, "-c", ENGINE, str(self.path), choice.tier.value]
            return command, base | choice.environment

        self.supervisor = Supervisor(
            *start(link.choice),
            folder / "s",
            Limits(**QUICK | {"back_off_s": 0.01}),
            echo=echo,
            faults=self.faults,
            tiers=Tiers(link, start),
        )

    async def until(self, condition):
        """Run until a condition holds, then stop."""
        running = asyncio.create_task(self.supervisor.run())
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.01)
            self.supervisor.stop()
            await running

    def until_failed(self):
        asyncio.run(self.until(lambda: self.supervisor.stage is Stage.FAILED))

    @property
    def tiers(self):
        return [line.split() for line in self.path.read_text().splitlines()]

    def count(self, kind):
        return self.faults.count(kind)


def test_each_fault_is_one_tier_down_and_only_those_at_the_last_count(tmp_path):
    lives = Lives(tmp_path, [FAULT])
    lives.until_failed()
    served = ["peer-push", "host-pinned", "nccl-shm", "nccl-shm", "nccl-shm"]
    assert lives.tiers == [[tier, tier] for tier in served]
    assert lives.link.counts == {
        (Tier.PEER_PUSH, Tier.HOST_PINNED): 1,
        (Tier.HOST_PINNED, Tier.NCCL_SHM): 1,
    }
    assert [end.counts for end in lives.supervisor.ends] == [False, False, True, True, True]
    assert lives.supervisor.ends[0].reason == (
        "the engine ended with exit status 1; all-reduce: peer-push is demoted to host-pinned: "
        + EXPIRED
    )
    assert lives.supervisor.failure.startswith("3 ends within 15 minutes; the last: ")
    assert "nccl-shm is the last tier and is not demoted" in lives.supervisor.failure
    assert lives.count(FaultKind.ALL_REDUCE_FAILED) == lives.count(FaultKind.ENGINE_ENDED) == 5


def test_a_tier_that_was_asked_for_is_kept_until_the_engine_is_given_up(tmp_path):
    lives = Lives(tmp_path, [FAULT], override="peer-push")
    lives.until_failed()
    assert lives.tiers == [["peer-push", "peer-push"]] * 3
    assert f"peer-push was asked for and is not demoted: {EXPIRED}" in lives.supervisor.failure
    assert lives.link.demotions == ()
    assert lives.count(FaultKind.ALL_REDUCE_FAILED) == 3


def test_an_end_is_judged_by_its_own_life_s_output(tmp_path):
    """The second life says nothing of an all-reduce; what the first said is not held against it."""
    lives = Lives(tmp_path, [FAULT, "print('CUDA out of memory'); sys.exit(1)"])
    lives.until_failed()
    assert lives.tiers[1:] == [["host-pinned", "host-pinned"]] * 3
    assert lives.count(FaultKind.ALL_REDUCE_FAILED) == 1
    assert list(lives.supervisor.tail) == ["CUDA out of memory"]


def test_the_whole_output_is_read_before_the_end_is_judged(tmp_path):
    """The engine is dead while its last lines still wait behind our own slow output."""
    plan = [f"print('x' * 5); sys.stdout.flush(); time.sleep(0.1); {FAULT}", "time.sleep(60)"]
    lives = Lives(tmp_path, plan, echo=lambda data: time.sleep(0.4))
    asyncio.run(lives.until(lambda: len(lives.supervisor.ends) == 1))
    assert lives.supervisor.ends[0].counts is False
    assert lives.link.choice.tier is Tier.HOST_PINNED


def test_a_process_that_keeps_the_output_open_delays_a_restart_no_longer_than_that(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(supervisor_module, "OUTPUT_S", 0.2)
    hold = tmp_path / "hold"
    hold.touch()
    code = f"import os, time\nwhile os.path.exists({str(hold)!r}): time.sleep(0.1)"
    left = f"subprocess.Popen([sys.executable, '-c', {code!r}], start_new_session=True); "
    lives = Lives(tmp_path, [left + "sys.exit(1)", "time.sleep(60)"])
    try:
        asyncio.run(lives.until(lambda: lives.supervisor.num_lives == 2))
    finally:
        hold.unlink()


def test_a_stall_demotes_a_tier_that_waits_for_ever(tmp_path):
    arms = PROBE | {"peer-pull": "healthy"}
    lives = Lives(tmp_path, [FAULT, "time.sleep(60)"], arms)

    def third_life():
        num_lives = len(lives.tiers) if lives.path.exists() else 0
        if num_lives == lives.supervisor.num_lives == 2:
            lives.supervisor.report_stall("the engine made no progress for 120 s")
        return num_lives == 3

    asyncio.run(lives.until(third_life))
    assert [tier for tier, _ in lives.tiers] == ["peer-push", "vllm-custom", "nccl-p2p"]
    assert lives.count(FaultKind.ENGINE_STALLED) == 1
    assert not lives.supervisor.ends[1].counts


def test_requests_are_told_to_come_again_and_the_next_tier_serves_them(tmp_path):
    """With vLLM's own words for a dead engine: a whole answer, then the end of the process."""
    with running_front(tmp_path, [{}], probe=PROBE) as front:
        front.wait_until_ready()
        assert all_reduce(front) == ("peer-push", [])
        status, headers, body = front.post(fails=EXPIRED, status=500, message=DEAD)
        assert status == 503
        assert int(headers["Retry-After"]) >= 1
        assert json.loads(body)["error"]["code"] == 503
        wait_until(lambda: len(front.lives) == 2, "the second life")
        front.wait_until_ready()
        assert front.post(events=1)[0] == 200
        assert all_reduce(front) == ("host-pinned", [("peer-push", EXPIRED)])
        metrics = front.ask("GET", "/metrics")[2].decode()
        demotion = 'all_reduce_demotions_total{from="peer-push",to="host-pinned"} 1.0'
        assert f"dsv4_serve_{demotion}" in metrics
        assert 'dsv4_serve_faults_total{kind="all_reduce_failed"} 1.0' in metrics
        assert f"peer-push is demoted to host-pinned: {EXPIRED}" in front.readiness()["reason"]


def all_reduce(front):
    """The tier in use, and those before it with their faults."""
    found = json.loads(front.ask("GET", "/status.json")[2])["all_reduce"]
    return found["chosen"], [(d["tier"], d["reason"]) for d in found["demoted_from"]]


@pytest.fixture
def front(tmp_path):
    with running_front(tmp_path, [{}]) as front:
        front.wait_until_ready()
        yield front


def test_an_event_that_says_the_engine_is_dead_is_one_to_come_again(front):
    error = json.dumps({"error": {"message": DEAD, "code": 500}}, separators=(",", ":"))
    text = json.dumps({"text": f'"message": "{DEAD}"'})
    parts = [f"data: {text}\n\n", f'data: {{"n": 1}}\n\ndata: {error}\n\n', "data: [DONE]\n\n"]
    status, _, body = front.post(parts=parts)
    assert status == 200
    *before, last = body.decode().removesuffix("\n\n").split("\n\n")
    assert before == [f"data: {text}", 'data: {"n": 1}']
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503


def test_other_errors_and_words_pass_as_they_are(front):
    assert front.post(status=500)[0::2] == (500, b'{"error": {"message": "told to"}}')
    assert front.post(status=400, message=DEAD)[0] == 400
    said = f'{{"error": {{"message": "{DEAD}"}}}}'
    assert front.post(parts=[said], type="application/json")[2].startswith(said.encode())
