"""Thousands of requests, finished and broken off, leave nothing in the gateway.

All 10,000 are a command of their own, because they take a minute of a core:

    python -m tests.serve.test_leak [REQUESTS]
"""

import asyncio
import json
import sys
import tempfile
from pathlib import Path

from tests.serve.front_process import running_front, wait_until
from tests.serve.test_metrics import samples

NUM_WARM, NUM_REQUESTS, NUM_CLIENTS = 500, 1500, 8
MAX_GROWTH_BYTES = 8 * 2**20
KINDS = (
    {"events": 3},
    {"events": 2, "type": "text/plain"},
    {"status": 400},
    {"events": 1000, "gap_s": 0.005},  # its client goes away in the answer
    {"prefill_steps": 1000},  # ... before it
    {"half": True},  # ... within its own request
)


async def one(port: int, job: dict) -> None:
    """One request on a connection of its own, read to its end or broken off."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(job).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body))
    writer.write(body[:-1] if "half" in job else body)
    await writer.drain()
    if job.get("events") == 1000:
        assert b" 200 " in await reader.read(100)
    elif "prefill_steps" in job or "half" in job:
        await asyncio.sleep(0.01)
    else:
        answer = await reader.read()
        assert (b" 400 " if "status" in job else b" 200 ") in answer[:20], answer
        assert "status" in job or answer.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"), answer
    writer.close()


async def send(port: int, num_requests: int) -> None:
    """Requests of all kinds by turns, from several clients at once."""
    jobs = iter([KINDS[number % len(KINDS)] for number in range(num_requests)])

    async def client() -> None:
        for job in jobs:
            await one(port, job)

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))


def held(front) -> dict[str, float]:
    """What the gateway holds, as it says itself."""
    page = samples(front.ask("GET", "/metrics")[2].decode())
    return {
        name: page[f"dsv4_serve_{name}", ()]
        for name in ("process_resident_bytes", "process_open_fds", "process_tasks")
    } | {"in_flight": page["dsv4_serve_requests_in_flight", ()]}


def leak(folder: Path, num_requests: int) -> tuple[dict[str, float], dict[str, float]]:
    """What the gateway holds when it is warm, and after so many requests more."""
    with running_front(folder, [{}], monitor_interval_s=60, admission={"streams": 64}) as front:
        front.wait_until_ready()

        def rested() -> dict[str, float] | None:
            now = held(front)
            return now if not now["in_flight"] else None

        asyncio.run(send(front.port, NUM_WARM))
        before = wait_until(rested, "all has ended")
        asyncio.run(send(front.port, num_requests))
        return before, wait_until(
            lambda: (
                (now := rested())
                and now["process_open_fds"] <= before["process_open_fds"]
                and now["process_tasks"] <= before["process_tasks"]
                and now
            ),
            "sockets and tasks end",
        )


def test_requests_leave_no_memory_socket_or_task_behind(tmp_path):
    before, after = leak(tmp_path, NUM_REQUESTS)
    assert after["process_resident_bytes"] - before["process_resident_bytes"] < MAX_GROWTH_BYTES


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = leak(Path(name), int(sys.argv[1]) if sys.argv[1:] else 10_000)
    print(json.dumps(dict(zip(("before", "after"), found, strict=True)), indent=1))
