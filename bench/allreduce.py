"""Time a BF16 all-reduce of two ranks by tier and size, one run, one table.

    python -m bench.allreduce [--devices 0,1] [--out JSON]

With two devices each rank is a process with a GPU of its own. With one (`--devices 0,0`) both ranks
are streams of one process, and only lines in pinned host memory are timed: they cross the real link
then, while NCCL refuses two ranks on a device and peer memory would be the device's own.

A CUDA graph holds CALLS calls, each waiting for the peer's; a time is that of one replay divided by
CALLS, and median and p99 are over replays. `copy` is the control: the same graph with a copy in
place of each call, so what a launch costs without any peer. An arm that cannot run here, or that
does not come to its end in time, says why and keeps what it measured; then the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench import provenance
from bench.arm_processes import Ran, run_processes
from kernels import build
from kernels.allreduce import OneShotAllReduce, Tier, exchange_by_store

REPOSITORY = Path(__file__).resolve().parents[1]
SCHEMA_VERSION = 2
SIZES = tuple(kib * 1024 for kib in (8, 16, 32, 64, 128, 256, 512))
CALLS, REPLAYS, UNTIMED_REPLAYS = 20, 300, 30
ARM_TIMEOUT_S = 90
WORKER = (sys.executable, "-m", "bench.allreduce", "--worker")
DEADLINE_S = 5.0

AllReduce = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, room for the sum) -> the sum


@dataclass
class End:
    """One rank's way to reduce, and what surrounds the capture of a graph of it."""

    all_reduce: AllReduce
    capture: Callable[[], AbstractContextManager[Any]] = nullcontext
    check: Callable[[], None] = lambda: None


# ------------------------------------------------------------------------------------- arms


def ours(tier: Tier, rank: int, store: Any) -> End:
    """Our one-shot kernel."""
    exchange = exchange_by_store(store, rank, 2)
    end = OneShotAllReduce(rank, 2, exchange, tier=tier, deadline_s=DEADLINE_S)
    return End(all_reduce=end.all_reduce, check=end.check)


def copy(rank: int, store: Any) -> End:
    """The control: no peer at all."""

    def all_reduce(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(x)

    return End(all_reduce)


def nccl(rank: int, store: Any) -> End:
    """PyTorch's NCCL, in place."""
    torch.distributed.init_process_group("nccl", store=store, rank=rank, world_size=2)

    def all_reduce(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(out.copy_(x))
        return out

    return End(all_reduce)


def vllm_custom(rank: int, store: Any) -> End:
    """vLLM's custom all-reduce. It copies its input when its graph is not captured by vLLM."""
    from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    custom = CustomAllreduce(torch.distributed.group.WORLD, torch.cuda.current_device())
    if custom.disabled:
        raise RuntimeError("vLLM disables its custom all-reduce on these devices")

    def all_reduce(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return custom.all_reduce(x, out=out, registered=torch.cuda.is_current_stream_capturing())

    return End(all_reduce, capture=custom.capture)


ARMS: dict[str, Callable[[int, Any], End]] = {
    "copy": copy,
    "peer-push": lambda rank, store: ours(Tier.PEER_PUSH, rank, store),
    "vllm-custom": vllm_custom,
    "nccl-p2p": nccl,
    "host-pinned": lambda rank, store: ours(Tier.HOST_PINNED, rank, store),
    "nccl-shm": nccl,
}
ENVIRONMENT = {"nccl-shm": {"NCCL_P2P_DISABLE": "1"}}
ONE_DEVICE_ARMS = ("copy", "host-pinned")


# ---------------------------------------------------------------------------------- measuring


class Measured:
    """A graph of CALLS calls of one size on one rank's stream."""

    def __init__(self, end: End, rank: int, num_bytes: int) -> None:
        self.end, self.stream = end, torch.cuda.Stream()
        place = torch.arange(num_bytes // 2, device="cuda") % 32
        self.x = (place + rank).to(torch.bfloat16)
        self.out = torch.empty_like(self.x)
        self.sum = (2 * place + 1).to(torch.bfloat16)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()

    def call(self) -> None:
        """One call outside of a graph, for what is set up at the first."""
        with torch.cuda.stream(self.stream):
            self.end.all_reduce(self.x, self.out)

    def capture(self) -> None:
        with self.end.capture(), torch.cuda.graph(self.graph, stream=self.stream):
            for _ in range(CALLS):
                self.out = self.end.all_reduce(self.x, self.out)

    def start(self) -> list[torch.cuda.Event]:
        """Replay once; the events around it."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        with torch.cuda.stream(self.stream):
            marks[0].record()
            self.graph.replay()
            marks[1].record()
        return marks


def measure(ranks: list[tuple[int, End]], num_bytes: int) -> dict[str, Any]:
    """Times of the ranks that live in this process, of the first of them.

    Returns:
        `median_us` and `p99_us` of a call, `right`: whether the last sums are exact.
    """
    measured = [Measured(end, rank, num_bytes) for rank, end in ranks]
    for step in (Measured.call, Measured.capture):
        for one in measured:
            step(one)
        torch.cuda.synchronize()
    marks = []
    for _ in range(UNTIMED_REPLAYS + REPLAYS):
        # A rank that is not in this process is started by its own; the calls bring both together.
        marks.append([one.start() for one in measured])
        if len(measured) > 1:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    for one in measured:
        one.end.check()
    times = sorted(
        pair[-1][0].elapsed_time(pair[-1][1]) * 1000 / CALLS for pair in marks[UNTIMED_REPLAYS:]
    )
    return {
        "median_us": statistics.median(times),
        "p99_us": times[int(0.99 * len(times))],
        "right": all(torch.equal(one.out, one.sum) for one in measured),
    }


def worker(arm: str, rank: int | None, devices: tuple[int, int], store_path: str) -> None:
    """One process of an arm: one rank, or both when `rank` is None; prints each size's answer."""
    torch.cuda.set_device(devices[rank or 0])
    own = [0, 1] if rank is None else [rank]
    store = torch.distributed.HashStore() if rank is None else None
    ends: dict[int, End] = {}

    def construct(r: int) -> None:
        ends[r] = ARMS[arm](r, store or torch.distributed.FileStore(store_path, 2))

    threads = [threading.Thread(target=construct, args=(r,)) for r in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(ends) < len(own):
        sys.exit(1)  # the thread has printed why
    peers = None if rank is None else torch.cuda.can_device_access_peer(*devices)
    about = {"nccl": nccl_version(), "driver_says_peer_access": peers}
    print(json.dumps(about | {"device": torch.cuda.get_device_name()}), flush=True)
    for num_bytes in SIZES:
        line = {"num_bytes": num_bytes} | measure([(r, ends[r]) for r in own], num_bytes)
        print(json.dumps(line), flush=True)
    if rank is not None:  # neither frees what the other still uses
        folder = Path(store_path).parent
        (folder / f"done-{rank}").touch()
        while not all((folder / f"done-{r}").exists() for r in range(2)):
            time.sleep(0.01)
    os._exit(0)  # NCCL and CUDA IPC tear down in no order that both ranks share


def nccl_version() -> str:
    """Of the NCCL that PyTorch loads."""
    return ".".join(map(str, torch.cuda.nccl.version()))


# -------------------------------------------------------------------------------- the command


def run_arm(
    arm: str, devices: tuple[int, int], say: Callable[[str], object], timeout_s: float
) -> dict[str, Any]:
    """Start an arm's processes and take what they measure, a size at a time.

    Returns:
        `error`: why it is not whole, None when it is; `sizes`: what rank 0 measured until then.
    """
    ranks = [None] if devices[0] == devices[1] else [0, 1]
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        commands = [
            [*WORKER, arm, str(rank), f"{devices[0]},{devices[1]}", store] for rank in ranks
        ]

        def on_line(number: int, line: dict[str, Any]) -> None:
            if number == 0 and "num_bytes" in line:
                say(f"{line['num_bytes'] // 1024} KB: {line['median_us']:.1f} us")

        env = os.environ | ENVIRONMENT.get(arm, {})
        ran = run_processes(commands, REPOSITORY, env, timeout_s, on_line)
    return result_of(arm, ran)


def result_of(arm: str, ran: Ran) -> dict[str, Any]:
    """What the lines of an arm's processes come to."""
    found: dict[str, Any] = {"error": ran.error, "sizes": {}}
    for line in ran.lines[0]:
        if "num_bytes" in line:
            found["sizes"][str(line["num_bytes"])] = {
                name: line[name] for name in ("median_us", "p99_us", "right")
            }
        else:
            found |= line
    right = all(line.get("right", True) for lines in ran.lines for line in lines)
    if not right and arm != "copy":
        found["error"] = "a sum was wrong" + (f"; {ran.error}" if ran.error else "")
    return found


def table(arms: dict[str, dict[str, Any]]) -> str:
    """Microseconds of a call, median and p99, as Markdown."""
    sizes = [f"{n // 1024} KB" for n in SIZES]
    lines = ["| tier | " + " | ".join(sizes) + " |", "|---" * (1 + len(SIZES)) + "|"]
    for name, arm in arms.items():
        row = []
        for n in SIZES:
            cell = arm["sizes"].get(str(n))
            if cell is None or not (cell["right"] or name == "copy"):
                row.append("wrong" if cell else "-")
                continue
            row.append(f"{cell['median_us']:.1f} / {cell['p99_us']:.1f}")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += [f"\n{name}: {arm['error']}" for name, arm in arms.items() if arm["error"]]
    return "\n".join(lines)


def origin(commit: str | None) -> dict[str, Any]:
    """Where the numbers come from. The cards are named by the arms: this process never asks CUDA,
    which might not answer after an arm that hung.
    """
    checkout = provenance.checkout(REPOSITORY)
    return {
        "commit": commit or checkout["commit"],
        "kernel_sources_sha256": build.sources_sha256(),
        "topology": topology(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def topology() -> str | None:
    """`nvidia-smi topo -m`, None where it does not tell."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def pair(text: str) -> tuple[int, int]:
    """Two devices of `0,1`."""
    first, second = (int(device) for device in text.split(","))
    return first, second


def main(argv: list[str] | None = None) -> int:
    """Entry point; exit status 1 when one of our own tiers gave no sound answer."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        arm, rank, both, store = argv[1:]
        worker(arm, None if rank == "None" else int(rank), pair(both), store)
    parser = argparse.ArgumentParser(prog="python -m bench.allreduce", description=__doc__)
    parser.add_argument("--devices", default="0,1", help="two CUDA devices, or one twice")
    parser.add_argument("--out", type=Path, metavar="JSON")
    parser.add_argument(
        "--arm-timeout", type=float, metavar="S", default=ARM_TIMEOUT_S, help="of each arm"
    )
    parser.add_argument("--commit", help="recorded instead of what git tells")
    args = parser.parse_args(argv)
    devices = pair(args.devices)
    there = torch.cuda.device_count()
    if max(devices) >= there:
        print(f"bench.allreduce: devices {args.devices}; there are {there}", file=sys.stderr)
        return 2
    names = list(ARMS) if devices[0] != devices[1] else list(ONE_DEVICE_ARMS)
    arms: dict[str, dict[str, Any]] = {}
    result = {"schema_version": SCHEMA_VERSION, "calls_per_replay": CALLS, "replays": REPLAYS,
              "provenance": origin(args.commit), "arms": arms}  # fmt: skip
    for number, name in enumerate(names, 1):

        def say(text: str, head: str = f"bench.allreduce: {number}/{len(names)} {name}") -> None:
            print(f"{head}: {text}", file=sys.stderr, flush=True)

        say(f"at most {args.arm_timeout:g} s")
        arms[name] = run_arm(name, devices, say, args.arm_timeout)
        say(arms[name]["error"] or "done")
        if args.out:
            save(args.out, result)
    print(table(arms))
    ours_failed = [n for n in ("peer-push", "host-pinned") if n in arms and arms[n]["error"]]
    return 1 if ours_failed else 0


def save(path: Path, result: dict[str, Any]) -> None:
    """Write it under another name, then rename: after each arm, so that none is lost."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.rename(path)


if __name__ == "__main__":
    sys.exit(main())
