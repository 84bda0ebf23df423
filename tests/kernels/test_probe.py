"""The probe end to end, with host threads for kernels and links that are broken on purpose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kernels import build, probe
from kernels.probe import Arm, ProbeConfig, ProbeImpossible, Verdict, run_arm
from tests.kernels.emulated_links import build_emulation, no_region_left
from tests.serve.front_process import is_running, wait_until


@pytest.fixture(scope="session")
def emulation(tmp_path_factory) -> Path:
    return build_emulation(tmp_path_factory.mktemp("probe"))


@pytest.fixture
def config(emulation, monkeypatch) -> ProbeConfig:
    """Short, and no host is slow: who is late by seconds on a busy one is still waited for."""
    monkeypatch.delenv("EMULATED_FAULT", raising=False)
    with no_region_left():
        yield ProbeConfig(
            small_bytes=256,
            large_bytes=8192,
            small_rounds=20,
            large_rounds=3,
            large_blocks=2,
            deadline_s=30.0,
            timeout_s=60.0,
            slow_latency_us=1e9,
            slow_bandwidth_gb_s=0.0,
            library=emulation,
        )


def impatient(config: ProbeConfig) -> ProbeConfig:
    """For a link on which nothing comes, whoever waits."""
    return replace(config, deadline_s=1.0)


@pytest.mark.parametrize("arm", list(Arm))
def test_a_good_link_is_healthy_both_ways(config, arm):
    result = run_arm(config, arm)
    assert (result.verdict, result.reason) == (Verdict.HEALTHY, "")
    assert set(result.directions) == {"0->1", "1->0"}
    for figures in result.directions.values():
        assert figures.latency_us >= 0
        assert figures.bandwidth_gb_s > 0


# 20 rounds and 2 untimed ones of flags, then the same with 16 lines each.
@pytest.mark.parametrize("fault", ["lose:5", "lose:30", "lose:600"])
def test_lost_stores_are_a_hang_that_ends_at_the_deadline(config, monkeypatch, fault):
    monkeypatch.setenv("EMULATED_FAULT", fault)
    result = run_arm(impatient(config), Arm.PEER_PUSH)
    assert result.verdict is Verdict.HANG
    assert "waited 1 s for flag" in result.reason  # and not: did not answer in 60 s
    assert run_arm(config, Arm.HOST_PINNED).verdict is Verdict.HEALTHY


def test_a_flipped_bit_is_wrong_data_with_what_was_read_and_sent(config, monkeypatch):
    monkeypatch.setenv("EMULATED_FAULT", "corrupt:100")
    result = run_arm(config, Arm.PEER_PUSH)
    assert result.verdict is Verdict.WRONG_DATA
    assert result.reason.startswith("0->1, 256 bytes: GPU 1 read ")
    read, sent = (result.reason.split(word)[1].split(" where ")[0] for word in ("read ", "where "))
    difference = int(read.split()[0], 16) ^ int(sent.split()[0], 16)
    assert difference == 0x100
    assert ", 1 times" in result.reason


def test_a_line_that_alone_is_lost_is_wrong_data_that_of_the_round_before(config, monkeypatch):
    flags, a_round = 22, 17
    monkeypatch.setenv("EMULATED_FAULT", f"skip:{flags + 2 * a_round + 6}")
    result = run_arm(config, Arm.PEER_PUSH)
    assert result.verdict is Verdict.WRONG_DATA
    assert ": round 3, line 5, 1 times" in result.reason


def test_a_kernel_that_ignores_its_deadline_is_killed_from_outside(config, monkeypatch):
    monkeypatch.setenv("EMULATED_FAULT", "stuck:50")
    asked, pairs = [], []
    real = probe.Pair.ask

    def ask(self, step, options):
        pairs.append(self)
        asked.append(step)
        if asked.count("run") == 2:  # the flags have come; of these stores one is the 50th
            self._timeout_s = 3.0
        return real(self, step, options)

    monkeypatch.setattr(probe.Pair, "ask", ask)
    result = run_arm(config, Arm.PEER_PUSH)
    assert result.verdict is Verdict.HANG
    assert "step run: the process of GPU 0 did not answer in 3 s and was killed" in result.reason
    assert not any(map(is_running, pairs[0].pids))


def test_a_link_that_cannot_be_mapped_is_impossible(config, monkeypatch):
    monkeypatch.setenv("EMULATED_FAULT", "no-ipc")
    result = run_arm(config, Arm.PEER_PULL)
    assert result.verdict is Verdict.IMPOSSIBLE
    assert "step map: GPU 0: dsv4_ipc_open: CUDA error 205" in result.reason


def test_a_link_below_the_limits_is_slow_and_says_by_how_much(config, monkeypatch):
    # Slow enough that a host that is busy while flags go there and back does not make up for it.
    monkeypatch.setenv("EMULATED_FAULT", "slow:4000")
    good = replace(config, slow_latency_us=1000.0, large_bytes=32)
    result = run_arm(good, Arm.PEER_PUSH)
    assert result.verdict is Verdict.SLOW
    assert "healthy is at most 1000 us and at least 0 GB/s" in result.reason
    assert result.directions["0->1"].latency_us > 8 * 4000  # of 16 lines
    result = run_arm(replace(config, slow_bandwidth_gb_s=1e6), Arm.HOST_PINNED)
    assert result.verdict is Verdict.SLOW


@pytest.mark.parametrize("gone", [False, True], ids=["dying", "gone"])
def test_a_process_that_dies_is_a_hang_with_its_status(config, monkeypatch, gone):
    """Whether or not the step can still be written to it."""
    real = probe.Pair.ask

    def ask(self, step, options):
        if step == "run":
            os.kill(self.pids[1], signal.SIGKILL)
            if gone:
                os.waitid(os.P_PID, self.pids[1], os.WEXITED | os.WNOWAIT)
        return real(self, step, options)

    monkeypatch.setattr(probe.Pair, "ask", ask)
    result = run_arm(impatient(config), Arm.HOST_PINNED)
    assert result.verdict is Verdict.HANG
    assert "died, status -9" in result.reason


def test_processes_die_with_a_killed_parent(config, tmp_path):
    script = (
        "import contextlib, sys, time; from pathlib import Path; from kernels.probe import *\n"
        "c = ProbeConfig(library=Path(sys.argv[1])); p = Pair(c, 'none')\n"
        # An answer, if only that there is no such region: they have asked for their end by then.
        "with contextlib.suppress(Refused): p.ask('open', [{}, {}])\n"
        "print(*p.pids, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(config.library)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=build.ROOT,
    )
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert all(map(is_running, pids))
    os.kill(pids[0], signal.SIGSTOP)  # end of input would not end this one
    parent.kill()
    parent.communicate()
    wait_until(lambda: not any(map(is_running, pids)), "both end")


def command(config, *more: str) -> list[str]:
    return ["--library", str(config.library), "--small-rounds", "20", "--large-rounds", "2", *more]


def test_the_command_prints_a_screen_writes_json_and_tells_by_its_status(
    config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("EMULATED_FAULT", "lose:5")
    real = probe.run_arm
    monkeypatch.setattr(
        probe,
        "run_arm",
        lambda config, arm: real(config if arm is Arm.HOST_PINNED else impatient(config), arm),
    )
    out = tmp_path / "probe.json"
    assert probe.main(command(config, "--out", str(out), "--deadline-s", "30")) == 1
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 24
    assert max(map(len, text.splitlines()[:2])) <= 80
    assert "peer access: hang" in text
    result = json.loads(out.read_text())
    assert result["key"] == {
        "boot_id": probe.boot_id(),
        "driver": probe.driver_version(),
        "bus_ids": ["0000:01:00.0", "0000:02:00.0"],
    }
    assert [arm["arm"] for arm in result["arms"]] == ["host-pinned", "peer-push", "peer-pull"]
    assert result["arms"][1]["verdict"] == "hang"
    assert result["peer_verdict"] == "hang"


@pytest.mark.parametrize(
    ("peer", "control", "status"),
    [
        ("healthy", "healthy", 0),
        ("slow", "healthy", 1),
        ("wrong data", "slow", 1),
        ("hang", "hang", 2),
        ("impossible", "wrong data", 2),
    ],
)
def test_the_exit_status_says_what_is_left(peer, control, status):
    arms = [{"arm": "host-pinned", "verdict": control}]
    assert probe.exit_status({"peer_verdict": peer, "arms": arms}) == status


def test_the_worst_arm_counts():
    results = [probe.ArmResult(Arm.PEER_PUSH, verdict) for verdict in Verdict]
    assert probe.worst(results) is Verdict.IMPOSSIBLE
    assert probe.worst(results[:3]) is Verdict.WRONG_DATA


def test_without_a_library_it_says_what_to_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(build.FOLDER_ENV, str(tmp_path))
    assert probe.main([]) == 3
    error = capsys.readouterr().err
    assert error.startswith("probe: kernels: ")
    assert "run `make kernels`" in error


def test_devices_that_are_not_there_are_named(config):
    with pytest.raises(ProbeImpossible, match="devices = 0,2; this process sees 2"):
        probe.probe(replace(config, devices=(0, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": (0,)}, r"devices = \(0,\); two are needed"),
        ({"small_bytes": 20}, "small_bytes = 20"),
        ({"large_rounds": 0}, "at least 1"),
        ({"deadline_s": 60.0}, "the deadline must be above 0 and below the timeout"),
    ],
)
def test_a_wrong_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ProbeConfig(**change)


def test_the_driver_is_read_where_there_is_one(tmp_path):
    path = tmp_path / "version"
    path.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.126.09  Release\n"
    )
    assert probe.driver_version(path) == "580.126.09"
    assert probe.driver_version(tmp_path / "none") is None
