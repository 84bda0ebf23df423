"""Each arm of the all-reduce benchmark ends, and none takes another's numbers with it."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from bench import allreduce, arm_processes
from tests.serve.front_process import ROOT, is_running, wait_until

# Stands for a rank: `vllm-custom` hangs after a size with a child beside it, `nccl-p2p` fails on
# one rank while the other waits, `host-pinned` sums wrong; the others measure all.
FAKE = """
import json, os, subprocess, sys, time
arm, rank, devices, store = sys.argv[1:]
note = open(os.environ["PIDS"], "a")
print(os.getpid(), file=note, flush=True)
print("a line of some library", flush=True)
print(json.dumps({"nccl": "2.30.4", "device": "a card"}), flush=True)
for kib in (8, 16, 32, 64, 128, 256, 512):
    if arm == "nccl-p2p" and rank == "1":
        sys.exit("RuntimeError: no peer access")
    if arm in ("vllm-custom", "nccl-p2p") and kib == 16:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, file=note, flush=True)
        if arm == "vllm-custom" and rank != "1":
            open(os.environ["HANGS"], "w")
        time.sleep(600)
    line = {"num_bytes": 1024 * kib, "median_us": 5.0 + kib, "p99_us": 9.0 + kib}
    print(json.dumps(line | {"right": arm != "host-pinned" or kib < 512}), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The worker of FAKE; returns the process ids that it has noted.

    On the benchmark's clock an hour passes when `vllm-custom` hangs; so no other arm is late,
    however busy the machine is.
    """
    path, pids = tmp_path / "fake.py", tmp_path / "pids"
    hangs = tmp_path / "hangs"

    def now_s() -> float:
        return time.monotonic() + 3600 * hangs.exists()

    path.write_text(FAKE)
    monkeypatch.setattr(allreduce, "WORKER", (sys.executable, str(path)))
    monkeypatch.setattr(allreduce.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(allreduce, "topology", lambda: None)
    monkeypatch.setenv("PIDS", str(pids))
    monkeypatch.setenv("HANGS", str(hangs))
    monkeypatch.setattr(arm_processes, "time", SimpleNamespace(monotonic=now_s, sleep=time.sleep))
    return lambda: [int(pid) for pid in pids.read_text().split()]


def test_an_arm_that_hangs_or_fails_keeps_its_sizes_and_the_next_one_runs(fake, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--out", str(out), "--arm-timeout", "60", "--commit", "c"]
    assert allreduce.main(arguments) == 1  # ours summed wrong
    result = json.loads(out.read_text())
    arms = result["arms"]
    assert list(arms) == list(allreduce.ARMS)
    assert {name: arm["error"] for name, arm in arms.items()} == {
        "copy": None,
        "peer-push": None,
        "vllm-custom": "no end within 60 s",
        "nccl-p2p": "status 1: RuntimeError: no peer access",
        "host-pinned": "a sum was wrong",
        "nccl-shm": None,
    }
    sizes = {name: len(arm["sizes"]) for name, arm in arms.items()}
    assert sizes["vllm-custom"] == 1
    assert sizes["nccl-shm"] == sizes["copy"] == len(allreduce.SIZES)
    first = {"median_us": 13.0, "p99_us": 17.0, "right": True}
    assert arms["vllm-custom"]["sizes"]["8192"] == first
    assert arms["copy"]["device"] == "a card"
    wait_until(lambda: not any(map(is_running, fake())), "all end")
    printed = capsys.readouterr()
    assert "bench.allreduce: 3/6 vllm-custom: 8 KB: 13.0 us\n" in printed.err
    assert "bench.allreduce: 3/6 vllm-custom: no end within 60 s\n" in printed.err
    assert "| vllm-custom | 13.0 / 17.0 | - | - |" in printed.out
    assert "| 261.0 / 265.0 | wrong |" in printed.out
    assert "\nvllm-custom: no end within 60 s\n" in printed.out


def test_what_is_measured_is_written_before_the_next_arm_begins(fake, tmp_path, monkeypatch):
    out, seen = tmp_path / "out.json", []
    run_arm = allreduce.run_arm

    def looks(arm, *rest):
        seen.append(list(json.loads(out.read_text())["arms"]) if out.exists() else [])
        return run_arm(arm, *rest)

    monkeypatch.setattr(allreduce, "run_arm", looks)
    allreduce.main(["--out", str(out), "--devices", "0,0", "--commit", "c"])
    assert seen == [[], ["copy"]]


def test_a_process_that_does_not_die_is_named_and_left(fake, monkeypatch):
    """As one that waits in the driver."""
    kill = os.killpg
    monkeypatch.setattr(arm_processes.os, "killpg", lambda *_: None)
    monkeypatch.setattr(arm_processes, "END_S", 0.2)
    found = allreduce.run_arm("vllm-custom", (0, 0), print, 60.0)
    leader, _ = fake()
    assert found["error"] == f"no end within 60 s; process {leader} does not die"
    assert list(found["sizes"]) == ["8192"]
    kill(leader, signal.SIGKILL)


def test_the_ranks_die_with_the_benchmark(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from bench.arm_processes import run_processes; "
        "run_processes([[sys.executable, '-c', 'import os, time; "
        'open("pid", "w").write(str(os.getpid())); time.sleep(600)\']], '
        "Path(sys.argv[1]), dict(os.environ), 600)"
    )
    parent = os.spawnl(os.P_NOWAIT, sys.executable, sys.executable, "-c", code, str(tmp_path))
    pid = int(wait_until(lambda: (path := tmp_path / "pid").exists() and path.read_text(), "a pid"))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_until(lambda: not is_running(pid), "the rank ends")


def test_a_rank_whose_parent_was_faster_in_dying_ends():
    code = "import os; from bench.arm_processes import die_with; die_with(os.getpid()); print(1)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")
