"""The all-reduce and the probe: two processes on one GPU or one each, and two streams of one.

Two processes that share a GPU take turns on it: a call there costs time slices. Two streams run at
the same time: lines in pinned host memory then cross the real PCIe link. Tests that need two GPUs
are skipped on one.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

from kernels import allreduce_abi as abi
from kernels import build, probe
from kernels.allreduce import Exchange, OneShotAllReduce, Tier, exchange_by_store

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
TIERS = [tier.value for tier in Tier]
KB = 1024
SIZES = [16, 48, KB, 2 * KB, 4 * KB, 4 * KB + 16, 8 * KB, 16 * KB, 24 * KB, 32 * KB, 33 * KB]
SIZES += [64 * KB, 96 * KB, 128 * KB, 255 * KB, 256 * KB, 511 * KB + 16, 512 * KB]
ROUND_SIZES = [8 * KB, 16 * KB, 32 * KB, 64 * KB, 128 * KB, 256 * KB, 512 * KB]
ROUNDS = 100_000
SHARED_REPLAYS = 1_000  # two processes on one GPU: time slices
STREAM_REPLAYS = 10_000
DEADLINE_S = 2.0
DEVICES = [
    pytest.param((0, 0), id="one-gpu"),
    pytest.param(
        (0, 1),
        id="two-gpus",
        marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    ),
]
APART = (0, 1) if torch.cuda.device_count() > 1 else (0, 0)


def inputs(rank: int, call: int, num_bytes: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1000 * call + rank)
    return torch.randn(num_bytes // 2, generator=g).to(BF16).cuda()


def exact(call: int, num_bytes: int) -> torch.Tensor:
    return (inputs(0, call, num_bytes).float() + inputs(1, call, num_bytes).float()).to(BF16)


class Replayed:
    """A graph of one call per size whose inputs change with each replay; it checks its outputs."""

    def __init__(self, end: OneShotAllReduce, sizes: list[int]) -> None:
        self.counter = torch.zeros(1, device="cuda")
        self.wrong = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.sum = torch.zeros(1, dtype=torch.int64, device="cuda")
        places = [torch.arange(num_bytes // 2, device="cuda") for num_bytes in sizes]

        def step(reduce: Callable[[torch.Tensor], torch.Tensor] = end.all_reduce) -> None:
            self.counter.add_(1).remainder_(61)  # whole numbers below 256: exact in BF16
            for place in places:
                x = (place % 32 + self.counter + 3 * end.rank).to(BF16)
                out = reduce(x)
                self.wrong.add_((out != (2 * (place % 32 + self.counter) + 3).to(BF16)).sum())
                bits = out.view(torch.int16).to(torch.int64)
                self.sum.mul_(31).add_((bits * (place + 1)).sum())

        self.step = step

    def reset(self) -> None:
        """Forget the steps that were taken."""
        for value in (self.counter, self.wrong, self.sum):
            value.zero_()

    def capture(self, stream: torch.cuda.Stream) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.step()


# ------------------------------------------------------------------------- two processes


def rank_main(options: dict) -> dict:
    """What one process does; its answer."""
    rank, do = options["rank"], options["do"]
    torch.cuda.set_device(options["devices"][rank])
    store = torch.distributed.FileStore(options["store"], 2)
    exchange = exchange_by_store(store, rank, 2)
    end = OneShotAllReduce(
        rank,
        2,
        exchange,
        tier=options["tier"],
        deadline_s=options["deadline_s"],
        hash_every=64,
        first_generation=options["first_generation"],
    )
    answer: dict = {}
    if do == "work":
        answer |= every_size(end) | late_peer(end, exchange)
        answer |= replays(end, exchange, options["replays"])
    else:
        answer |= broken_peer(end, exchange, do)
    try:
        end.check()
        answer["error"] = None
    except RuntimeError as error:
        answer["error"] = str(error)
    answer["completed"] = end.completed
    if not do.startswith("SIG"):
        exchange("done", True)  # neither frees what the other still uses
    end.close()
    return answer


def every_size(end: OneShotAllReduce) -> dict:
    """Each size twice: what the sums hash to, and the sizes of those that are not exact."""
    hashes, wrong = [], []
    for call, num_bytes in enumerate(SIZES * 2):
        out = end.all_reduce(inputs(end.rank, call, num_bytes))
        if not torch.equal(out, exact(call, num_bytes)):
            wrong.append(num_bytes)
        hashes.append(hashlib.sha256(out.view(torch.uint8).cpu().numpy().tobytes()).hexdigest())
    return {"hashes": hashes, "wrong_sizes": wrong}


def late_peer(end: OneShotAllReduce, exchange: Exchange) -> dict:
    """Rank 1 comes a second late, within the deadline."""
    x = inputs(end.rank, 0, 8 * KB)
    exchange("late", True)
    if end.rank == 1:
        time.sleep(1)
    start = time.monotonic()
    end.all_reduce(x)
    torch.cuda.synchronize()
    return {"late": time.monotonic() - start}


def replays(end: OneShotAllReduce, exchange: Exchange, count: int) -> dict:
    """A graph of all ROUND_SIZES, replayed: sums that were wrong, and what all of them hash to."""
    replayed = Replayed(end, ROUND_SIZES)
    replayed.step()
    replayed.capture(torch.cuda.Stream())
    exchange("captured", True)
    for _ in range(count):
        replayed.graph.replay()
    torch.cuda.synchronize()
    return {"wrong": replayed.wrong.item(), "sum": replayed.sum.item()}


def broken_peer(end: OneShotAllReduce, exchange: Exchange, do: str) -> dict:
    """After three calls rank 1 gets a signal, sleeps, or leaves a call out."""
    x = inputs(end.rank, 0, 8 * KB)
    end.all_reduce(x)
    torch.cuda.synchronize()
    for _ in range(2):
        end.all_reduce(x)
    torch.cuda.synchronize()
    exchange("three", True)
    if end.rank == 1 and do.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, do))
    if end.rank == 1 and do.startswith("sleep"):
        time.sleep(float(do.removeprefix("sleep")))
    start = time.monotonic()
    if end.rank == 0 or do != "skip":
        end.all_reduce(x)
    torch.cuda.synchronize()
    answer = {"waited": time.monotonic() - start, "record": end.expired() and vars(end.expired())}
    if answer["record"]:
        start = time.monotonic()
        for _ in range(100):
            end.all_reduce(x)
        torch.cuda.synchronize()
        answer["later"] = time.monotonic() - start
    return answer


def two_processes(tmp_path, devices, do, tier, deadline_s=30.0, first_generation=1, **options):
    common = {"do": do, "tier": tier, "store": str(tmp_path / "store"), "deadline_s": deadline_s}
    common |= {"first_generation": first_generation, "devices": devices, **options}
    command = [sys.executable, "-m", "tests.gpu.test_allreduce"]
    processes = [
        subprocess.Popen(
            [*command, json.dumps({**common, "rank": rank})],
            stdout=subprocess.PIPE,
            text=True,
            cwd=build.ROOT,
        )
        for rank in range(2)
    ]
    answers = []
    try:
        waited_for = processes[:1] if do.startswith("SIG") else processes
        for process in waited_for:
            text, _ = process.communicate(timeout=120)
            assert process.returncode == 0
            answers.append(json.loads(text.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not list(abi.SHM_FOLDER.glob("dsv4-allreduce-*"))
    return answers


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("devices", DEVICES)
def test_two_processes_get_the_rounded_sum_and_the_same_bits(tmp_path, devices, tier):
    """At every size and across the wrap, with a peer that is late, and in replays of a graph."""
    shared = devices[0] == devices[1]
    rounds = SHARED_REPLAYS if shared else ROUNDS // len(ROUND_SIZES) + 1
    options = {"replays": rounds, "first_generation": 2**32 - 20}
    a, b = two_processes(tmp_path, devices, "work", tier, **options)
    assert (a["error"], b["error"]) == (None, None)
    assert (a["wrong_sizes"], b["wrong_sizes"]) == ([], [])
    assert len(a["hashes"]) == 2 * len(SIZES)
    assert a["hashes"] == b["hashes"]
    assert 0.8 < a["late"] < DEADLINE_S
    assert (a["wrong"], b["wrong"]) == (0, 0)
    assert a["sum"] == b["sum"]
    calls = 2 * len(SIZES) + 1 + (rounds + 1) * len(ROUND_SIZES)
    # From 2**32 - 20 on, 0 and 1 left out.
    assert a["completed"] == b["completed"] == calls - 20 + 1


@pytest.mark.parametrize("do", ["SIGKILL", "SIGSTOP", "sleep3.5", "skip"])
@pytest.mark.parametrize("tier", TIERS)
def test_a_peer_that_does_not_come_is_reported_within_the_deadline(tmp_path, tier, do):
    a = two_processes(tmp_path, APART, do, tier, deadline_s=DEADLINE_S)[0]
    assert DEADLINE_S <= a["waited"] < DEADLINE_S + 1
    assert a["later"] < 0.5  # a hundred calls: each returns at once
    record = a["record"]
    assert (record["rank"], record["source"], record["operation"]) == (0, 1, 1)
    assert (record["generation"], record["expected"], record["num_bytes"]) == (4, 4, 8 * KB)
    assert record["seen"] == [2, 2]  # the slot's last generation
    assert record["line"] < KB
    assert record["block"] < 4
    assert DEADLINE_S <= record["waited_s"] < DEADLINE_S + 0.5
    assert a["error"].startswith("all_reduce_oneshot: rank 0 waited 2.0")
    assert a["completed"] == 3


@pytest.mark.parametrize("devices", DEVICES)
def test_the_probe_of_two_processes_sees_no_wrong_data_and_no_hang(tmp_path, devices):
    out = tmp_path / "probe.json"
    command = ["--devices", ",".join(map(str, devices)), "--small-rounds", "20"]
    command += ["--large-rounds", "3"]
    status = probe.main([*command, "--deadline-s", "10", "--out", str(out)])
    assert status in (0, 1)
    for arm in json.loads(out.read_text())["arms"]:
        assert arm["verdict"] in ("healthy", "slow"), arm["reason"]
        assert set(arm["directions"]) == {"0->1", "1->0"}


# --------------------------------------------------------------------------- two streams


@pytest.fixture
def ends():
    """Two ranks of host-pinned lines in this process, on a stream each."""
    store = torch.distributed.HashStore()
    made: list[OneShotAllReduce | None] = [None, None]

    def construct(rank: int) -> None:
        exchange = exchange_by_store(store, rank, 2)
        made[rank] = OneShotAllReduce(rank, 2, exchange, deadline_s=DEADLINE_S)

    threads = [threading.Thread(target=construct, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(made)
    yield made
    torch.cuda.synchronize()
    for end in made:
        end.close()


@pytest.fixture
def streams():
    return [torch.cuda.Stream(), torch.cuda.Stream()]


def test_two_streams_agree_at_every_size_while_other_work_fills_the_gpu(ends, streams):
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda").to(BF16)
    for call, num_bytes in enumerate(SIZES * 3):
        xs = [inputs(rank, call, num_bytes) for rank in range(2)]
        want = exact(call, num_bytes)
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            a @ a
        outs = []
        for rank in range(2):
            with torch.cuda.stream(streams[rank]):
                outs.append(ends[rank].all_reduce(xs[rank]))
        torch.cuda.synchronize()
        for end in ends:
            end.check()
        assert torch.equal(outs[0], want)
        assert torch.equal(outs[0].view(torch.int16), outs[1].view(torch.int16))


def test_two_streams_replay_graphs(ends, streams):
    replayed = [Replayed(end, [8 * KB]) for end in ends]
    torch.cuda.synchronize()
    # CUDA loads a kernel at its first launch and waits for an idle GPU: no rank may wait for the
    # other then.
    for r, stream in zip(replayed, streams, strict=True):
        with torch.cuda.stream(stream):
            r.step(torch.Tensor.clone)
            r.reset()
    torch.cuda.synchronize()
    for r, stream in zip(replayed, streams, strict=True):
        with torch.cuda.stream(stream):
            r.step()
    torch.cuda.synchronize()
    for r, stream in zip(replayed, streams, strict=True):
        r.capture(stream)
    for _ in range(STREAM_REPLAYS):
        for r, stream in zip(replayed, streams, strict=True):
            with torch.cuda.stream(stream):
                r.graph.replay()
    torch.cuda.synchronize()
    for end in ends:
        end.check()
        assert end.completed == STREAM_REPLAYS + 1
    assert [r.wrong.item() for r in replayed] == [0, 0]
    assert replayed[0].sum.item() == replayed[1].sum.item()


def test_a_call_alone_gives_up_and_the_other_rank_sees_its_record(ends, streams):
    x = inputs(0, 0, 8 * KB)
    torch.cuda.synchronize()
    start = time.monotonic()
    with torch.cuda.stream(streams[0]):
        ends[0].all_reduce(x)
    torch.cuda.synchronize()
    assert DEADLINE_S <= time.monotonic() - start < DEADLINE_S + 1
    for end in ends:
        with pytest.raises(RuntimeError, match="rank 0 waited 2.0. s for rank 1: generation 1, "):
            end.check()


if __name__ == "__main__":
    print(json.dumps(rank_main(json.loads(sys.argv[1]))), flush=True)
