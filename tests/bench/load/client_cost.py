"""What the client itself costs: CPU time for each chunk, and time and memory for deep prompts.

    python -m tests.bench.load.client_cost results/bench-client-DATE.json

The server is a fake in this process; the client is always a process of its own, so that what is
counted is the client's alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import uvloop

from bench import provenance
from bench.load import run as run_module
from bench.load import stream
from bench.load.rounds import request_body
from bench.report import write_result
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
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True, timeout=60
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


def prompts_cost() -> dict[str, float]:
    """A whole `bench run` of four prompts of 524,000 tokens, from start to result.

    Returns:
        cpu_s, wall_s and peak_memory_bytes of its process, tokenizing by the server included.
    """
    server = FakeServer(window=1 << 20, block=1 << 20)
    with serving(server) as url, tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "deep.json"
        options = ["--url", url, "--depth", str(DEEP_TOKENS), "--streams", str(DEEP_STREAMS)]
        options += ["--output", "2", "--repeats", "1", "--max-warm-up-rounds", "0"]
        started = time.monotonic()
        client = subprocess.Popen(
            [sys.executable, "-m", "bench", "run", *options, "--result", str(output)],
            cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        _, status, usage = os.wait4(client.pid, 0)
        wall_s = time.monotonic() - started
        client.returncode = os.waitstatus_to_exitcode(status)
        assert client.returncode == 0
        assert json.loads(output.read_text())["cells"][0]["problems"] == []
    assert [len(body["prompt"]) for body in server.bodies] == [DEEP_TOKENS] * DEEP_STREAMS
    return {
        "streams": DEEP_STREAMS,
        "tokens": DEEP_TOKENS,
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "wall_s": round(wall_s, 3),
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }


def main(path: Path) -> None:
    """Measure both three times and write the result."""
    write_result(path, {
        "schema_version": 1,
        "kind": "client-cost",
        "chunk": [chunk_cost() for _ in range(3)],
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
