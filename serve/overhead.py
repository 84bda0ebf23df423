"""What the gateway adds to a chunk and to the first byte, beside the same server asked directly.

    python -m serve.overhead [--json FILE]

A server in a process of its own stamps each chunk with the clock that all processes share; a client
in another compares the stamp with its own when the chunk arrives. Direct and relayed rounds
alternate, and rounds through a copier: a process that hands bytes on and knows no HTTP. What that
adds is the price of a second process on this machine, which no relay can be below.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
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
from serve.versions import collect_versions

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


class Copier(asyncio.Protocol):
    """One side of a connection whose bytes are handed to the other."""

    def __init__(self) -> None:
        self.other: asyncio.WriteTransport | None = None
        self.early = b""

    def data_received(self, data: bytes) -> None:
        if self.other:
            self.other.write(data)
        else:
            self.early += data

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other:
            self.other.close()


class Accepted(Copier):
    """The client's side: connects the server's."""

    def __init__(self, uds: Path) -> None:
        super().__init__()
        self.uds = uds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.task = asyncio.ensure_future(self._join(transport))

    async def _join(self, transport: Any) -> None:
        loop = asyncio.get_running_loop()
        try:
            self.other, there = await loop.create_unix_connection(Copier, str(self.uds))
        except OSError:  # the server does not listen yet: its client asks again
            transport.close()
            return
        there.other = transport
        self.other.write(self.early)


async def run_copier(port: int, uds: Path) -> None:
    """The copier before a server that runs already."""
    sock = listen("127.0.0.1", port)
    server = await asyncio.get_running_loop().create_server(lambda: Accepted(uds), sock=sock)
    await server.serve_forever()


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


async def measure(urls: dict[str, str], pids: dict[str, int]) -> list[dict[str, Any]]:
    """One case for each number of streams, paced: unpaced chunks would join on their way."""
    cases = [(streams, 300, 10.0) for streams in STREAMS]
    found = []
    for num_streams, num_chunks, gap_ms in cases:
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in urls}
        spent = {name: cpu_s(pid) for name, pid in pids.items()}
        for _ in range(ROUNDS):
            for name, url in urls.items():
                rounds[name].append(await round_of(url, num_streams, num_chunks, gap_ms))
        case: dict[str, Any] = {"streams": num_streams, "chunks": num_chunks, "gap_ms": gap_ms}
        for name, each in rounds.items():
            case[name] = {key: statistics.median(r[key] for r in each) for key in each[0]}
        for name, pid in pids.items():
            took, part = cpu_s(pid) - spent[name], case[name]
            part["cpu_us_per_chunk"] = took * 1e6 / (ROUNDS * num_streams * num_chunks)
            part["added_way_us"] = part["way_us"] - case["direct"]["way_us"]
            part["added_first_us"] = part["first_us"] - case["direct"]["first_us"]
        for key in ("added_way_us", "cpu_us_per_chunk"):
            case[f"{key}_beside_copier"] = case["relayed"][key] - case["copied"][key]
        found.append(case)
    return found


def machine() -> dict[str, Any]:
    """What the figures depend on. load_average: of the last minute, these processes among it."""
    return {
        "commit": collect_versions().commit,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "uvloop": uvloop.__version__,
        "uvicorn": uvicorn.__version__,
    }


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
    parser.add_argument("--part", choices=("server", "gateway", "copier"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=18_790, help="this and the next two")
    parser.add_argument("--uds", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.part == "gateway":
        uvloop.run(run_gateway(arguments.port, arguments.uds))
        return 0
    if arguments.part == "copier":
        uvloop.run(run_copier(arguments.port, arguments.uds))
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
        ports = [str(arguments.port + number) for number in range(3)]
        started = [
            subprocess.Popen([*me, "server", "--port", ports[0]]),
            subprocess.Popen([*me, "server", "--uds", uds]),
            subprocess.Popen([*me, "gateway", "--uds", uds, "--port", ports[1]]),
            subprocess.Popen([*me, "copier", "--uds", uds, "--port", ports[2]]),
        ]
        try:
            names = ("direct", "relayed", "copied")
            urls = {n: f"http://127.0.0.1:{p}" for n, p in zip(names, ports, strict=True)}
            for url in urls.values():
                asyncio.run(wait_for(url))
            pids = {"relayed": started[2].pid, "copied": started[3].pid}
            found = asyncio.run(measure(urls, pids))
        finally:
            for process in started:
                process.terminate()
                process.wait()
    for case in found:
        for name in pids:
            part = case[name]
            print(
                f"{case['streams']:>3} streams, {name}: way +{part['added_way_us']:.0f} us, "
                f"first byte +{part['added_first_us']:.0f} us, "
                f"CPU {part['cpu_us_per_chunk']:.0f} us a chunk"
            )
    if arguments.json:
        result = {"command": "python -m serve.overhead", "machine": machine(), "cases": found}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
