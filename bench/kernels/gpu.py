"""The device: what it is, CUDA graphs of it, and times of their replays."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.kernels import figures

COPY_BYTES = 1 << 30
COPIES = 20
WARM_UP_LEAST_S, WARM_UP_MOST_S = 0.15, 2.0


@dataclass(frozen=True)
class DeviceInfo:
    """The card, as PyTorch and nvidia-smi name it. None where nvidia-smi does not tell."""

    name: str
    capability: str
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int
    driver: str | None = None
    power_limit_w: float | None = None
    ecc: str | None = None


@dataclass(frozen=True)
class Graph:
    """A captured graph, and the function that it was captured from: its closure owns the buffers
    that the graph reads and writes."""

    graph: torch.cuda.CUDAGraph
    run: Callable[[], None]


class Unavailable(RuntimeError):
    """Something that a run needs is not there: a device, memory, a library."""


class Gpu:
    """One CUDA device.

    Raises:
        Unavailable: there is none.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise Unavailable("bench.kernels: PyTorch finds no CUDA device")
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.info = DeviceInfo(
            name=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            l2_bytes=properties.L2_cache_size,
            memory_bytes=properties.total_memory,
            **_nvidia_smi(str(properties.uuid)),
        )

    def free_bytes(self) -> int:
        """Memory that is free."""
        return torch.cuda.mem_get_info(self.device)[0]

    def peak_bytes(self) -> int:
        """The most memory that PyTorch held so far."""
        return torch.cuda.max_memory_reserved(self.device)

    def capture(self, run: Callable[[], None]) -> Graph:
        """Run once, for what is set up at a first call, then capture."""
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return Graph(graph, run)

    def replay(self, graph: Graph) -> None:
        """Replay and wait."""
        graph.graph.replay()
        torch.cuda.synchronize()

    def time_round(self, graphs: Sequence[Graph]) -> list[float]:
        """Microseconds of one replay of each graph, one after the other without a pause."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * len(graphs))]
        for i, graph in enumerate(graphs):
            events[2 * i].record()
            graph.graph.replay()
            events[2 * i + 1].record()
        torch.cuda.synchronize()
        pairs = zip(events[::2], events[1::2], strict=True)
        return [1000 * begin.elapsed_time(end) for begin, end in pairs]

    def copy_gb_s(self) -> float:
        """Median rate of a copy within the device's memory, bytes read plus bytes written."""
        source, target = (
            torch.ones(COPY_BYTES, dtype=torch.uint8, device=self.device) for _ in range(2)
        )
        times = []
        for _ in range(COPIES):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        del source, target
        torch.cuda.empty_cache()
        return 2 * COPY_BYTES / statistics.median(times) / 1e6

    def release(self) -> None:
        """Give back what no tensor or graph holds any more."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def warm_up(gpu: Any, graphs: Sequence[Any], clock: Callable[[], float] = time.monotonic) -> float:
    """Replay until the time of a round no longer changes.

    Returns:
        Microseconds of a round.
    """
    start = clock()
    rounds: list[float] = []
    while True:
        rounds.append(sum(gpu.time_round(graphs)))
        spent = clock() - start
        settled = spent >= WARM_UP_LEAST_S and figures.is_settled(rounds)
        if settled or (spent >= WARM_UP_MOST_S and len(rounds) >= 2):
            return statistics.median(rounds[-figures.WINDOW :])


def _nvidia_smi(uuid: str) -> dict[str, Any]:
    """Driver, power limit and ECC mode; nothing where the tool is missing or names no such card."""
    uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    query = "--query-gpu=driver_version,power.limit,ecc.mode.current"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", uuid]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    fields = [field.strip() for field in done.stdout.strip().split(",")]
    if done.returncode or len(fields) != 3:
        return {}
    driver, power, ecc = fields
    try:
        limit = float(power)
    except ValueError:
        limit = None
    return {"driver": driver, "power_limit_w": limit, "ecc": ecc}
