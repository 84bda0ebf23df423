"""A start that hangs is ended, dumped and begun again; one that is slow is left alone."""

import asyncio
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from serve import silence, supervisor, watchdog
from serve.activity import read_session, works
from serve.allreduce_tier import AllReduce, Key, Known, Tiers
from serve.faults import FaultKind, Faults
from serve.relay import Relay
from serve.silence import MAX_GAP, Silence
from serve.stages import WAITING, Stage
from serve.supervisor import Limits, Supervisor
from serve.watchdog import WatchConfig, Watchdog
from tests.serve.front_process import QUICK, WAIT_S, running_front, wait_until

KEY = Key("boot", None, ("0000:01:00.0", "0000:21:00.0"))
ARMS = {"peer-push": "healthy", "peer-pull": "healthy", "host-pinned": "healthy"}
FAILED = "all_reduce_oneshot: rank 0 waited 2.00 s for rank 1"  # demotes peer-push
BOUND_S = 0.5
LONG_S = 60.0
BAR = "Loading safetensors checkpoint shards:  50% Completed | {0}/4 [00:00<00:01, 4.00it/s]"
SAID = {
    Stage.STARTING: "INFO vLLM is started",
    Stage.LOADING: BAR.format(4),  # then come weights' post-processing and the first collective
    Stage.PREPARING: "INFO GPU KV cache size: 51,531 tokens",
    Stage.COMPILING: "INFO Start compiling function <f>",
    Stage.CAPTURING: "Capturing CUDA graphs (FULL):  45%|####      | 10/22 [00:01<00:01,  8.9it/s]",
    Stage.LISTENING: "INFO Starting vLLM server on unix:/s",
}
# Each life notes the tier it was started with, then does as PLAN says.
ENGINE = """
import json, os, subprocess, sys, time
path, uds = sys.argv[1:]
with open(path, "a") as file:
    print(os.environ.get("DSV4_ALLREDUCE_TIER"), file=file)
import http.server, socketserver

def say(line):
    print(line, flush=True)

def hang(seconds=600, until="/none"):
    # As a rank and the one that waits for it: one spins, one says so.
    end, at = time.monotonic() + seconds, 0
    while time.monotonic() < end and not os.path.exists(until):
        if time.monotonic() > at:
            say("INFO " + WAITING + " in 60 seconds.")
            at = time.monotonic() + 0.1

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def address_string(self):
        return ""

def serve():
    socketserver.UnixStreamServer(uds, Health).serve_forever()

plan = json.loads(os.environ["PLAN"])
life = len(open(path).readlines()) - 1
exec(plan[min(life, len(plan) - 1)])
""".replace("WAITING", repr(WAITING), 1)


class Lives:
    """A supervisor and its watchdog over lives of `plan`; with `tiers`, of two cards."""

    def __init__(self, folder, plan, tiers=True, on_ready=lambda: None, **config):
        self.path, self.reports = folder / "lives", folder / "reports"
        self.faults, self.link = Faults(), None
        command = [sys.executable, "-c", ENGINE, str(self.path), str(folder / "s")]
        environment = dict(os.environ) | {"PLAN": json.dumps(plan), "PYTHONFAULTHANDLER": "1"}
        given = None
        if tiers:
            said = {
                "key": {"boot_id": KEY.boot_id, "driver": None, "bus_ids": list(KEY.bus_ids)},
                "arms": [{"arm": a, "verdict": v, "reason": ""} for a, v in ARMS.items()],
            }
            self.link = AllReduce(folder / "allreduce.json", Known(KEY, said), "auto", print)
            given = Tiers(self.link, lambda choice: (command, environment | choice.environment))
            environment = environment | self.link.choice.environment
        self.supervisor = Supervisor(
            command,
            environment,
            folder / "s",
            Limits(**QUICK | {"back_off_s": 0.01}),
            on_ready,
            echo=lambda data: None,
            faults=self.faults,
            tiers=given,
        )
        bounds = {"start_stall_timeout_s": BOUND_S, "start_step_timeout_s": BOUND_S} | config
        self.watchdog = Watchdog(
            WatchConfig(self.reports, "m", **bounds),
            self.supervisor,
            Relay(folder / "s", 60.0, self.supervisor.lost),
            self.faults,
        )

    async def until(self, condition):
        """Run until a condition holds, then stop."""
        tasks = [asyncio.create_task(part.run()) for part in (self.supervisor, self.watchdog)]
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.01)
            self.supervisor.stop()
            await tasks[0]
        tasks[1].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await tasks[1]

    def until_ready(self):
        asyncio.run(self.until(lambda: self.supervisor.ready))

    @property
    def tiers(self):
        return self.path.read_text().split()

    @property
    def dumps(self):
        return [json.loads(path.read_text()) for path in sorted(self.reports.iterdir())]


@pytest.mark.parametrize("stage", SAID)
def test_a_start_that_hangs_at_any_stage_is_dumped_ended_and_begun_one_tier_down(tmp_path, stage):
    """The first life's fault leaves vLLM's own all-reduce, whose waits have no deadline."""
    plan = [f"say({FAILED!r}); sys.exit(1)", f"say({SAID[stage]!r}); hang()", "serve()"]
    lives = Lives(tmp_path, plan)
    lives.until_ready()
    assert lives.tiers == ["peer-push", "vllm-custom", "nccl-p2p"]
    end = lives.supervisor.ends[1]
    assert f"start showed no sign of progress for 1 s: {stage.value}" in end.reason
    assert "all-reduce: vllm-custom is demoted to nccl-p2p: the engine's start" in end.reason
    assert not end.counts
    [dump] = lives.dumps
    assert dump["reason"] in end.reason
    assert any("in hang" in line for line in dump["stacks"])
    assert [life.partition("=")[0] for life in dump["environment"]].count(
        "DSV4_ALLREDUCE_TIER"
    ) == 1
    assert lives.watchdog.num_stalls == lives.faults.count(FaultKind.ENGINE_STALLED) == 1
    assert lives.faults.count(FaultKind.ALL_REDUCE_FAILED) == 2


def test_between_two_shards_no_rank_waits_so_no_tier_is_at_fault_and_steps_have_a_bound(tmp_path):
    plan = [f"say({FAILED!r}); sys.exit(1)", f"say({BAR.format(1)!r}); hang()", "serve()"]
    lives = Lives(tmp_path, plan, start_stall_timeout_s=LONG_S)
    lives.until_ready()
    assert lives.tiers == ["peer-push", "vllm-custom", "vllm-custom"]
    end = lives.supervisor.ends[1]
    assert "loading, Loading safetensors checkpoint shards 1/4" in end.reason
    assert end.counts
    assert lives.faults.count(FaultKind.ALL_REDUCE_FAILED) == 1


def test_the_bound_of_steps_is_that_of_nothing_else(tmp_path):
    """After the last shard a kernel may be compiled, in a stage that counts no more."""
    plan = [f"say({BAR.format(1)!r}); say({BAR.format(4)!r}); hang({2 * BOUND_S}); serve()"]
    lives = Lives(tmp_path, plan, start_stall_timeout_s=LONG_S)
    lives.until_ready()
    assert lives.supervisor.ends == []


def test_three_starts_that_hang_are_enough_however_long_they_took(tmp_path):
    """Of one card or a CPU, where there is no tier; each takes longer than the window."""
    lives = Lives(tmp_path, ["hang()"], tiers=False, start_stall_timeout_s=0.2)
    lives.supervisor.limits = Limits(**QUICK | {"back_off_s": 0.01, "window_s": 0.1})
    asyncio.run(lives.until(lambda: lives.supervisor.stage is Stage.FAILED))
    assert set(lives.tiers) <= {"None"}
    said = "3 ends without a ready engine between them; the last: the engine's start showed no sign"
    assert lives.supervisor.failure.startswith(said)
    assert len(lives.supervisor.ends) == lives.watchdog.num_stalls == 3


def test_three_starts_that_crash_are_enough_however_long_they_took(tmp_path):
    lives = Lives(tmp_path, ["time.sleep(0.2); sys.exit(3)"], tiers=False)
    lives.supervisor.limits = Limits(**QUICK | {"back_off_s": 0.01, "window_s": 0.1})
    asyncio.run(lives.until(lambda: lives.supervisor.stage is Stage.FAILED))
    assert len(lives.supervisor.ends) == 3
    said = "3 ends without a ready engine between them; the last: the engine ended with exit status"
    assert lives.supervisor.failure.startswith(said)


def test_an_engine_that_was_ready_in_between_forgives_the_starts_before(tmp_path):
    def kill_the_third():
        if lives.supervisor.num_lives == 3:
            os.kill(lives.supervisor.pid, signal.SIGKILL)

    lives = Lives(tmp_path, ["hang()", "hang()", "serve()"], tiers=False, on_ready=kill_the_third)
    lives.supervisor.limits = Limits(**QUICK | {"back_off_s": 0.01, "window_s": 0.1})
    asyncio.run(lives.until(lambda: lives.supervisor.ready and lives.supervisor.num_lives == 4))
    assert [end.in_start for end in lives.supervisor.ends] == [True, True, False]


def test_what_is_to_end_does_not_become_ready_while_it_is_dumped(tmp_path):
    """Its requests would be lost, and the failed starts before it forgiven."""
    told = tmp_path / "told"
    lives = Lives(tmp_path, [f"hang(until={str(told)!r}); serve()", "serve()"], tiers=False)
    ready = []

    async def dump(reason):
        told.touch()
        while not (tmp_path / "s").exists():
            await asyncio.sleep(0.01)
        for _ in range(20):
            await asyncio.sleep(0.1)
            ready.append(lives.supervisor.ready)

    lives.supervisor.dump = dump
    lives.until_ready()
    assert (len(ready), any(ready)) == (20, False)
    assert [end.in_start for end in lives.supervisor.ends] == [True]


def test_an_engine_does_not_become_ready_while_the_server_shuts_down(tmp_path):
    lives = Lives(tmp_path, ["serve()"], tiers=False, start_stall_timeout_s=LONG_S)
    lives.supervisor.drain()
    end = []

    def two_seconds_of_listening():
        if not end and (tmp_path / "s").exists():
            end.append(time.monotonic() + 2.0)
        assert not lives.supervisor.ready
        return end and time.monotonic() > end[0]

    asyncio.run(lives.until(two_seconds_of_listening))
    assert "shutting down" in lives.supervisor.refusal().message


def test_a_dump_that_fails_ends_neither_the_server_nor_the_restart(tmp_path):
    lives = Lives(tmp_path, ["hang()", "serve()"], tiers=False)

    async def dump(reason):
        raise FileNotFoundError("no loader")

    lives.supervisor.dump = dump
    lives.until_ready()
    assert len(lives.supervisor.ends) == 1


def test_a_report_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """Who looks into the folder must not find half of one."""
    lives = Lives(tmp_path, ["hang()", "serve()"], tiers=False)

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watchdog.Path, "replace", fails)
    lives.until_ready()
    assert lives.supervisor.ends[0].report is None
    assert list(lives.reports.glob("*.json")) == []


def test_what_an_aborted_engine_says_is_waited_for(tmp_path):
    """Its stacks come behind our own slow output."""
    lives = Lives(tmp_path, ["hang()", "serve()"], tiers=False)
    lives.supervisor._echo = lambda data: time.sleep(0.3)
    lives.until_ready()
    [dump] = lives.dumps
    assert any("in hang" in line for line in dump["stacks"])


def test_the_next_life_begins_when_nothing_is_left_of_the_last(tmp_path, monkeypatch):
    """A rank whose driver takes its time to end it still holds the memory of its card."""
    left, seen = tmp_path / "left", tmp_path / "seen"
    plan = [
        "left = subprocess.Popen(['sleep', '2'], stdout=-3, stderr=-3)\n"
        f"open({str(left)!r}, 'w').write(str(left.pid)); sys.exit(1)",
        f"state = open('/proc/' + open({str(left)!r}).read() + '/stat').read().split()[2]\n"
        f"open({str(seen)!r}, 'w').write(state)",
    ]
    plan[1] = f"try: exec({plan[1]!r})\nexcept OSError: pass\nserve()"
    monkeypatch.setattr(supervisor, "signal_group", lambda group, number: True)
    lives = Lives(tmp_path, plan, tiers=False, start_stall_timeout_s=LONG_S)
    lives.until_ready()
    assert not seen.exists() or seen.read_text() == "Z"


def test_an_engine_whose_server_is_gone_before_it_begins_does_not_begin():
    """No signal of the server's death comes then."""
    for parent, status in ((os.getpid(), 0), (os.getpid() + 1, 1)):
        child = os.fork()
        if not child:
            supervisor.in_child(parent)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


def test_a_process_that_does_not_die_is_not_waited_for(tmp_path, monkeypatch):
    """As one that waits in a driver."""
    lives = Lives(tmp_path, ["hang()"], tiers=False)
    lives.supervisor.limits = Limits(**QUICK | {"die_s": 0.3})
    with monkeypatch.context() as patch:
        patch.setattr(supervisor, "signal_group", lambda group, number: True)
        patch.setattr(lives.supervisor, "dump", None)
        asyncio.run(lives.until(lambda: lives.supervisor.stage is Stage.FAILED))
    pid = lives.supervisor.pid
    assert lives.supervisor.failure.endswith(f"process {pid} does not die: reboot")
    assert lives.supervisor.num_lives == 1
    os.killpg(pid, signal.SIGKILL)


def test_what_is_told_when_it_is_ready_may_fail_or_hang(tmp_path):
    for number, tell in enumerate((lambda: 1 / 0, lambda: time.sleep(60))):
        folder = tmp_path / str(number)
        folder.mkdir()
        lives = Lives(folder, ["serve()"], tiers=False, on_ready=tell)
        start = time.monotonic()
        lives.until_ready()
        assert time.monotonic() - start < 30


# ------------------------------------------------------------------------------ signs of work

SLOW = {
    "a compiler": "subprocess.Popen(['sh', '-c', 'while :; do :; done']); time.sleep(60)",
    "compilers one by one": "while True: subprocess.run(['true']); time.sleep(0.05)",
    "memory": "kept = []\nwhile True: kept.append(b'x' * 2**16); time.sleep(0.01)",
    "a cache": "while True: open('f', 'wb').write(b'x' * 2**17); time.sleep(0.01)",
}
HUNG = {
    "a wait": "time.sleep(60)",
    "a spin": "while True: pass",
    "a spin in two": "os.fork()\nwhile True: time.sleep(0)",
    "a trickle": "while True: open('f', 'w').write('x' * 100); time.sleep(0.1)",
}
LOOK_S = 0.2


@contextlib.contextmanager
def session(code, folder):
    """A process that leads a session and has begun with `code`."""
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os, subprocess, time\nopen('begun', 'w')\n{code}"],
        cwd=folder,
        start_new_session=True,
    )
    try:
        wait_until((folder / "begun").exists, "it began")
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def seen_at_work(folder, kinds, num_looks, serving=False, settle=False):
    """Of processes that run side by side, those that a look sees at work.

    settle: not before a look has seen none: what they do first has new pages.
    """
    found = set()
    with contextlib.ExitStack() as stack:
        pids = {
            kind: stack.enter_context(session(code, folder / kind)) for kind, code in kinds.items()
        }
        for kind, code in kinds.items():
            num_processes = 1 + code.count("os.fork()")
            begun = functools.partial(has_processes, pids[kind], num_processes)
            wait_until(begun, f"the processes of {kind}")

        def look():
            before = {kind: read_session(pid) for kind, pid in pids.items()}
            time.sleep(LOOK_S)
            return {
                kind
                for kind, pid in pids.items()
                if works(before[kind], read_session(pid), pid, LOOK_S, serving)
            }

        if settle:
            wait_until(lambda: not look(), "a look that sees none")
        for _ in range(num_looks):
            found |= look()
            if found == set(kinds):
                break
    return found


def has_processes(pid, num_processes):
    return len(read_session(pid)) >= num_processes


def test_work_without_a_line_is_a_sign(tmp_path):
    assert seen_at_work(tmp_path, SLOW, 20) == set(SLOW)


def test_a_hang_gives_none_whatever_time_of_cpu_it_takes(tmp_path):
    assert seen_at_work(tmp_path, HUNG, 3, settle=True) == set()


IN_CHILD = "os.fork() and time.sleep(60)\n{}"
SERVING_SLOW = {
    "a compiler": SLOW["a compiler"],
    "compilers one by one": SLOW["compilers one by one"],
    "memory of a rank": IN_CHILD.format(SLOW["memory"]),
}
SERVING_HUNG = HUNG | {
    "a prompt that is read": SLOW["memory"],
    "a prompt that is handed on": SLOW["a cache"],
    "a prompt that is taken": IN_CHILD.format(SLOW["a cache"]),
}


def test_of_an_engine_that_serves_compilers_and_the_memory_of_ranks_are_signs(tmp_path):
    assert seen_at_work(tmp_path, SERVING_SLOW, 20, serving=True) == set(SERVING_SLOW)


def test_what_requests_give_it_to_do_is_none(tmp_path):
    assert seen_at_work(tmp_path, SERVING_HUNG, 3, serving=True, settle=True) == set()


def test_a_compiler_in_a_group_of_its_own_is_of_the_session(tmp_path):
    """As ninja's are."""
    code = "subprocess.Popen(['sleep', '60'], process_group=0); time.sleep(60)"
    with session(code, tmp_path / "s") as pid:

        def both():
            seen = read_session(pid)
            programs = [counts.program.rpartition("/")[2] for counts in seen.values()]
            return seen if len(seen) == 2 and programs.count("sleep") == 1 else None

        seen = wait_until(both, "it runs its own program")
        for child, _ in seen:
            if child != pid:
                os.kill(child, signal.SIGKILL)
        wait_until(lambda: works(seen, read_session(pid), pid, LOOK_S), "its end is seen")


def test_time_in_which_this_process_stood_still_is_not_held_against_the_engine(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(silence.time, "monotonic", lambda: now)
    watch = Silence(poll_s=2.0)
    watch.look(0, "a line")
    now += 2.0
    watch.look(0, "a line")
    assert watch.silent_s == watch.owed_s == 2.0
    now += 3600.0  # a machine that slept, a container that was paused
    watch.look(0, "a line")
    assert watch.silent_s == watch.owed_s == 2.0 + 2.0 * MAX_GAP


# --------------------------------------------------------------------------------- the server


def test_a_slow_start_serves_and_a_hung_one_shows_on_status_and_metrics(tmp_path):
    # Longer than a sound start is silent on a host with other work.
    watch = {"start_stall_timeout_s": 3.0, "start_step_timeout_s": 3.0}
    lives = [{"hangs": True}, {"compiles_s": 7.0}]
    with running_front(tmp_path, lives, watch=watch, probe=ARMS) as front:
        wait_until(lambda: status(front)["engine"]["owes_progress_s"] > 0, "it owes progress")
        front.wait_until_ready()
        assert front.post(events=1)[0] == 200
        wait_until(lambda: not status(front)["engine"]["owes_progress_s"], "it owes nothing")
        seen = status(front)
        assert len(front.lives) == 2
        assert seen["engine"]["stalls"] == 1
        [end] = seen["engine"]["ends"]
        assert "the engine's start showed no sign of progress" in end["reason"]
        assert json.loads(Path(end["report"]).read_text())["log"]
        assert seen["all_reduce"]["chosen"] == "peer-push"
        [demoted] = seen["all_reduce"]["demoted_from"]
        assert demoted["tier"] == "nccl-p2p"
        page = front.ask("GET", "/metrics")[2].decode()
        assert "dsv4_serve_engine_stalls_total 1.0" in page
        labels = '{from="nccl-p2p",to="nccl-shm"}'
        assert f"dsv4_serve_all_reduce_demotions_total{labels} 1.0" in page


def status(front):
    return json.loads(front.ask("GET", "/status.json")[2])


@pytest.mark.engine
def test_the_pinned_vllm_says_of_a_wait_what_is_taken_for_one():
    [folder] = find_spec("vllm").submodule_search_locations
    source = Path(folder, "distributed", "device_communicators", "shm_broadcast.py").read_text()
    assert f'LONG_WAIT_TIME_LOG_MSG = (\n    "{WAITING} "\n' in source
