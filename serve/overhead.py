"""What the gateway adds to a chunk and to the first byte, beside the same server asked directly.

    python -m serve.overhead [--json FILE]

A server in a process of its own stamps each chunk with the clock that all processes share; a client
in another compares the stamp with its own when the chunk arrives. Direct and relayed rounds
alternate. All of it runs on one machine, so the ratios say more than the microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
import uvloop

from serve.front import listen
from serve.gateway import Gateway
from serve.protocol import bounded
from serve.relay import Message, Receive, Relay, Send
from serve.stages import Stage
from serve.supervisor import Supervisor

CHUNK = b'data: {"t": %020d, "pad": "' + b"x" * 200 + b'"}\n\n'
STAMP = slice(12, 32)  # of the time in a chunk
STREAMS = (1, 64)
ROUNDS = 5
WAIT_S = 20


async def stamped(scope: Message, receive: Receive, send: Send) -> None:
    """Streams `n` chunks `gap_ms` apart, each with the time at which it is sent."""
    pairs = (pair.split(b"=") for pair in scope["query_string"].split(b"&") if pair)
    query = {name: float(value) for name, value in pairs}
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(int(query.get(b"n", 1))):
        if gap := query.get(b"gap_ms"):
            await asyncio.sleep(gap / 1000)
        body = CHUNK % time.monotonic_ns()
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def run_gateway(port: int, uds: Path) -> None:
    """The gateway before a server that runs already."""
    supervisor = Supervisor([], {}, uds)
    supervisor.stage = Stage.READY
    relay = Relay(uds, 60, supervisor.lost)
    await relay.start()
    config = uvicorn.Config(
        Gateway(supervisor, relay, stamped),  # of our own paths none is asked for
        http=bounded(65536, 60),
        log_config=None,
        access_log=False,
        lifespan="off",
    )
    await uvicorn.Server(config).serve(sockets=[listen("127.0.0.1", port)])


async def stream(session: aiohttp.ClientSession, url: str) -> tuple[float, list[float]]:
    """One stream. Returns microseconds to the first byte, and of each chunk's way."""
    start = time.monotonic_ns()
    first, ways, rest = 0.0, [], b""
    size = len(CHUNK % 0)
    async with session.get(url) as response:
        while part := await response.content.readany():
            now = time.monotonic_ns()
            first = first or (now - start) / 1000
            rest += part
            while len(rest) >= size:
                ways.append((now - int(rest[STAMP])) / 1000)
                rest = rest[size:]
    return first, ways


async def round_of(url: str, num_streams: int, num_chunks: int, gap_ms: float) -> dict[str, float]:
    """One round. way_us: median of a chunk's way; first_us: median to the first byte."""
    target = f"{url}/x?n={num_chunks}&gap_ms={gap_ms}"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await stream(session, f"{url}/x?n=1")
        start = time.monotonic()
        results = await asyncio.gather(*(stream(session, target) for _ in range(num_streams)))
        seconds = time.monotonic() - start
    ways = [way for _, each in results for way in each]
    if len(ways) != num_streams * num_chunks:
        raise RuntimeError(f"overhead: {len(ways)} chunks of {num_streams * num_chunks} arrived")
    return {
        "way_us": statistics.median(ways),
        "first_us": statistics.median(first for first, _ in results),
        "chunks_per_s": len(ways) / seconds,
    }


def cpu_s(pid: int) -> float:
    """CPU time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(direct: str, relayed: str, gateway_pid: int) -> list[dict[str, Any]]:
    """One case for each number of streams, paced: unpaced chunks would join on their way."""
    cases = [(streams, 300, 10.0) for streams in STREAMS]
    found = []
    for num_streams, num_chunks, gap_ms in cases:
        rounds: dict[str, list[dict[str, float]]] = {"direct": [], "relayed": []}
        spent = cpu_s(gateway_pid)
        for _ in range(ROUNDS):
            for name, url in (("direct", direct), ("relayed", relayed)):
                rounds[name].append(await round_of(url, num_streams, num_chunks, gap_ms))
        spent = cpu_s(gateway_pid) - spent
        case: dict[str, Any] = {"streams": num_streams, "chunks": num_chunks, "gap_ms": gap_ms}
        for name, each in rounds.items():
            case[name] = {key: statistics.median(r[key] for r in each) for key in each[0]}
        case["gateway_cpu_us_per_chunk"] = spent * 1e6 / (ROUNDS * num_streams * num_chunks)
        case["ratio"] = {key: case["relayed"][key] / case["direct"][key] for key in case["direct"]}
        case["added_way_us"] = case["relayed"]["way_us"] - case["direct"]["way_us"]
        case["added_first_us"] = case["relayed"]["first_us"] - case["direct"]["first_us"]
        found.append(case)
    return found


async def wait_for(url: str) -> None:
    """Wait for a server."""
    deadline = time.monotonic() + WAIT_S
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{url}/x?n=1"):
                    return
            except aiohttp.ClientError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)


def main(argv: list[str] | None = None) -> int:
    """Entry point; also of the processes that it starts."""
    parser = argparse.ArgumentParser(prog="python -m serve.overhead")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--part", choices=("server", "gateway"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=18_790, help="this and the next are used")
    parser.add_argument("--uds", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.part == "gateway":
        uvloop.run(run_gateway(arguments.port, arguments.uds))
        return 0
    if arguments.part == "server":
        where: dict[str, Any] = {"port": arguments.port}
        if arguments.uds:
            where = {"uds": str(arguments.uds)}
        uvicorn.run(stamped, log_config=None, access_log=False, lifespan="off", **where)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        uds = str(Path(folder) / "s")
        me = [sys.executable, "-m", "serve.overhead", "--part"]
        ports = [str(arguments.port), str(arguments.port + 1)]
        started = [
            subprocess.Popen([*me, "server", "--port", ports[0]]),
            subprocess.Popen([*me, "server", "--uds", uds]),
            subprocess.Popen([*me, "gateway", "--uds", uds, "--port", ports[1]]),
        ]
        try:
            urls = [f"http://127.0.0.1:{port}" for port in ports]
            for url in urls:
                asyncio.run(wait_for(url))
            found = asyncio.run(measure(*urls, started[2].pid))
        finally:
            for process in started:
                process.terminate()
                process.wait()
    for case in found:
        print(
            f"{case['streams']:>3} streams: way +{case['added_way_us']:.0f} us "
            f"(x {case['ratio']['way_us']:.2f}), first byte +{case['added_first_us']:.0f} us "
            f"(x {case['ratio']['first_us']:.2f}), {case['gateway_cpu_us_per_chunk']:.0f} us CPU a "
            f"chunk, throughput x {case['ratio']['chunks_per_s']:.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
