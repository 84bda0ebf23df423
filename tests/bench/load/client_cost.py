"""What the client itself costs: time and calls for each chunk, time and memory for deep prompts.

    python -m tests.bench.load.client_cost results/bench-client-DATE.json

The server is a fake in a thread. Where time or memory is measured the client is a process of its
own, so that what is counted is the client's alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import pstats
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import uvloop

from bench import provenance
from bench.load import run as run_module
from bench.load import stream
from bench.load.rounds import request_body
from bench.load.trace import Trace
from bench.report import write_result
from tests.bench.load.calls import Calls
from tests.bench.load.fake_server import FakeServer, serving

REPOSITORY = Path(__file__).resolve().parents[3]
STREAMS = 64
CHUNKS = 60
GAP_S = 0.04  # slow enough that nearly every chunk is a read of its own, which is the dearest
DEEP_STREAMS, DEEP_TOKENS = 4, 524_000


def chunk_cost() -> dict[str, float]:
    """CPU time of one chunk, from the socket to the trace, with 64 streams open.

    Returns:
        us_per_chunk: all CPU time of the client's process over the chunks, from the tenth to the
            ninetieth hundredth of them: connecting is a cost of a request. chunks_per_read: 1 is
            the dearest.
    """
    server = FakeServer(ttft_s=0.5, gap_s=GAP_S, num_speculative_tokens=1, tokens_per_chunk=2)
    with serving(server) as url:
        command = [sys.executable, "-m", "tests.bench.load.client_cost", "--client", url]
        done = subprocess.run(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True, timeout=300
        )
    return json.loads(done.stdout)


class _Counted(stream.Stream):
    """Counts what all streams read, and reads the CPU clock where all have begun and none ends."""

    reads = chunks = 0
    marks: ClassVar[list[tuple[int, int, float]]] = []  # (reads, chunks, CPU s)

    def feed(self, received: bytes, at_s: float) -> None:
        super().feed(received, at_s)
        cls = _Counted
        cls.reads += 1
        cls.chunks += received.count(b"data: ")
        if cls.chunks >= STREAMS * CHUNKS * (1 + 8 * len(cls.marks)) // 10:
            cls.marks.append((cls.reads, cls.chunks, time.process_time()))


async def _read_streams(url: str) -> dict[str, float]:
    async with run_module.session(60, None) as session:
        output = 1 + 2 * (CHUNKS - 1)
        bodies = [
            stream.encode(request_body("fake", [1, *range(n, n + 40)], output))
            for n in range(STREAMS)
        ]
        with stream.undisturbed():
            start_s = time.perf_counter()
            traces = await asyncio.gather(
                *(
                    stream.send(session, f"{url}/v1/completions", body, start_s, None, _Counted())
                    for body in bodies
                )
            )
    assert not [t.error for t in traces if t.error]
    assert sum(len(t.chunks) for t in traces) == STREAMS * CHUNKS
    begin, end = _Counted.marks[:2]
    reads, chunks, cpu_s = (b - a for a, b in zip(begin, end, strict=True))
    return {
        "streams": STREAMS,
        "chunks": chunks,
        "chunks_per_read": round(chunks / reads, 3),
        "us_per_chunk": round(cpu_s / chunks * 1e6, 2),
    }


class _InTurn(stream.Stream):
    """Lets the server write a chunk only when the one before was read, and notes the calls so far.

    So every chunk is a read of its own however busy the machine is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls()
        self.read: list[tuple[int, int]] = []  # (chunks of this read, calls so far)
        self._may_write = threading.Semaphore(1)

    async def turn(self) -> None:
        """Wait in the server's thread until it may write."""
        if not await asyncio.to_thread(self._may_write.acquire, timeout=60):
            raise TimeoutError("the client did not read a chunk within 60 s")

    def feed(self, received: bytes, at_s: float) -> None:
        super().feed(received, at_s)
        self.calls.end()
        self.calls.count -= 1  # this function
        self.read.append((received.count(b"data: "), self.calls.count))
        self._may_write.release()
        self.calls.begin()


def chunk_calls() -> dict[str, float]:
    """Calls that one chunk takes in the client's thread, from the socket to the trace.

    Returns:
        calls_per_chunk: Python functions, and C functions that Python calls; aiohttp's and those
            of `bench`, from the tenth to the ninetieth hundredth of the chunks. chunks_per_read:
            not 1 if the count is not that of single chunks.
    """
    reader = _InTurn()
    server = FakeServer(ttft_s=0, gap_s=0, turn=reader.turn)
    body = stream.encode(request_body("fake", list(range(40)), CHUNKS))

    async def read(url: str) -> Trace:
        async with run_module.session(60, None) as session:
            with stream.undisturbed():
                start_s = time.perf_counter()
                reader.calls.begin()
                sent = await stream.send(
                    session, f"{url}/v1/completions", body, start_s, None, reader
                )
                reader.calls.end()
                return sent

    with serving(server) as url:
        sent = uvloop.run(read(url))
    assert sent.error is None, sent.error
    assert len(sent.chunks) == CHUNKS
    begin, end = CHUNKS // 10, CHUNKS * 9 // 10
    num_chunks = sum(chunks for chunks, _ in reader.read[begin:end])
    calls = reader.read[end - 1][1] - reader.read[begin - 1][1]
    return {
        "calls_per_chunk": calls / num_chunks,
        "chunks_per_read": num_chunks / (end - begin),
    }


def prompts_cost(*, profiled: bool = False) -> dict[str, float]:
    """A whole `bench run` of four prompts of 524,000 tokens, from start to result.

    Args:
        profiled: count the calls, too; the times are then longer.

    Returns:
        cpu_s, wall_s and peak_memory_bytes of its process, tokenizing by the server included;
        calls of its main thread where profiled.
    """
    server = FakeServer(window=1 << 20, block=1 << 20)
    with serving(server) as url, tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "deep.json"
        options = ["--url", url, "--depth", str(DEEP_TOKENS), "--streams", str(DEEP_STREAMS)]
        options += ["--output", "2", "--repeats", "1", "--max-warm-up-rounds", "0"]
        profile = Path(folder) / "profile"
        profiler = ["-m", "cProfile", "-o", str(profile)] if profiled else []
        started = time.monotonic()
        client = subprocess.Popen(
            [sys.executable, *profiler, "-m", "bench", "run", *options, "--result", str(output)],
            cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        _, status, usage = os.wait4(client.pid, 0)
        wall_s = time.monotonic() - started
        client.returncode = os.waitstatus_to_exitcode(status)
        assert client.returncode == 0
        assert json.loads(output.read_text())["cells"][0]["problems"] == []
        counted = {"calls": pstats.Stats(str(profile)).total_calls} if profiled else {}
    assert [len(body["prompt"]) for body in server.bodies] == [DEEP_TOKENS] * DEEP_STREAMS
    return {
        "streams": DEEP_STREAMS,
        "tokens": DEEP_TOKENS,
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "wall_s": round(wall_s, 3),
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        **counted,
    }


def main(path: Path) -> None:
    """Measure each three times, count the calls, and write the result."""
    write_result(path, {
        "schema_version": 1,
        "kind": "client-cost",
        "chunk": [chunk_cost() for _ in range(3)],
        "calls": chunk_calls(),
        "prompts": [prompts_cost() for _ in range(3)],
        "provenance": {
            **provenance.checkout(REPOSITORY),
            "device": provenance.cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "command": provenance.command_line(sys.orig_argv, REPOSITORY),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    })  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "--client":
        print(json.dumps(uvloop.run(_read_streams(sys.argv[2]))))
    else:
        main(Path(sys.argv[1]))
