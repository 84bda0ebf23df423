"""A real HTTP server that stands for vLLM: it loads, streams, stalls, crashes as it is told.

    python fake_engine.py --uds PATH --control FOLDER [--lives PLAN]

PLAN is a JSON list with one object for each life, the last for all later ones:
load_s (seconds until it listens), gated (loads until the gate opens), crash ("loading": ends before
it listens), hangs (spins after the last shard), compiles_s (seconds, after it, in another program
and without a line), ignore_term, wedged (answers no canary), forks (starts a child in the process
group that outlives its parent).
What a request does is in its body: see `work`. What is gated goes on when the file `gate` of FOLDER
has one byte more: so a test, and no clock, says when. FOLDER gets one file for each life with its
pid, a line in `begun` for each request for work, and one in `aborted` for each whose client went
away.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import uvicorn


class Engine:
    """Counts iterations as vLLM does, and does what a request's body says."""

    def __init__(self, control: Path, wedged: bool) -> None:
        self.control = control
        self.iterations = self.running = self.served = 0
        self.drafts = self.accepted = 0
        self.cache = 0.0
        self.wedged = wedged

    async def __call__(self, scope, receive, send) -> None:
        path = scope["path"]
        if path == "/health":
            await answer(send, 200, b"")
        elif path == "/metrics":
            await answer(send, 200, self.metrics(), b"text/plain; version=0.0.4")
        elif path == "/echo":
            await echo(scope, receive, send)
        elif scope["method"] == "GET":
            await answer(send, 200, b'{"object": "list", "data": []}')
        else:
            body = b""
            while True:
                message = await receive()
                body += message.get("body", b"")
                if not message.get("more_body"):
                    break
            self.running += 1
            self.note("begun")
            job = asyncio.create_task(self.work(json.loads(body or b"{}"), send))
            gone = asyncio.create_task(receive())
            try:
                await asyncio.wait((job, gone), return_when=asyncio.FIRST_COMPLETED)
                if not job.done():
                    job.cancel()
                    self.note("aborted")
                else:
                    job.result()
            finally:
                gone.cancel()
                self.running -= 1
                self.served += 1

    def note(self, what: str) -> None:
        """Another line in a file of the control folder."""
        with (self.control / what).open("a") as file:
            file.write("x\n")

    async def work(self, job: dict, send) -> None:
        """prefill_steps, step_s: steps before the first byte; uncounted: as vLLM's are.
        events, gap_s, size: what is streamed; parts: exact pieces before it (latin-1).
        gated: each event but the first waits for the gate.
        end: crash, hang, cut or stop, after the events.
        status, message, times: answer at once, with a length and the message so many times.
        jit_s: before them a compiler works, and no step ends.
        fails: what a worker says of the all-reduce; the engine ends a moment later.
        drafts, accepted: added to the counters of speculation.
        """
        self.drafts += job.get("drafts", 0)
        self.accepted += job.get("accepted", 0)
        if "fails" in job:
            print(f"(Worker pid=1) ERROR RuntimeError: {job['fails']}", flush=True)
            asyncio.get_running_loop().call_later(0.1, os._exit, 1)
        if "status" in job:
            text = job.get("message", "told to") * job.get("times", 1)
            error = {"error": {"message": text}}
            await answer(send, job["status"], json.dumps(error).encode())
            return
        if "jit_s" in job:
            # In the foreground: else it would leave the process group, and outlive the engine.
            bound = ["timeout", "--foreground", str(job["jit_s"])]
            await asyncio.to_thread(subprocess.run, [*bound, "sh", "-c", "while :; do :; done"])
        for _ in range(job.get("prefill_steps", 0)):
            await asyncio.sleep(job.get("step_s", 0.01))
            self.iterations += not job.get("uncounted")
            self.cache += 0.001
        if job.get("max_tokens") == 1:
            self.note("canaries")
            await asyncio.sleep(3600 if self.wedged else 0)
        if job.get("wedge"):
            self.wedged = True
            await asyncio.sleep(3600)
        if job.get("crash_before"):
            os.kill(os.getpid(), signal.SIGKILL)
        headers = [(b"content-type", job.get("type", "text/event-stream").encode())]
        if "encoding" in job:
            headers.append((b"content-encoding", job["encoding"].encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        parts = [part.encode("latin-1") for part in job.get("parts", ())]
        for number in range(job.get("events", 0)):
            text = "x" * job.get("size", 1)
            parts.append(b"data: " + json.dumps({"n": number, "text": text}).encode() + b"\n\n")
        for number, part in enumerate(parts):
            while job.get("gated") and number > gate_bytes(self.control):
                await asyncio.sleep(0.01)
            self.iterations += 1
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(job.get("gap_s", 0.0))
        end = job.get("end", "stop")
        if end == "crash":
            await asyncio.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        elif end == "hang":
            self.wedged = True
            await asyncio.sleep(3600)
        elif end == "cut":
            return
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def metrics(self) -> bytes:
        """The counters that are read, under vLLM's names and labels."""
        label = '{engine="0",model_name="fake"}'
        values = {
            "vllm:iteration_tokens_total_count": self.iterations,
            "vllm:num_requests_running": self.running,
            "vllm:kv_cache_usage_perc": self.cache,
            "vllm:prompt_tokens_total": self.iterations * 100,
            "vllm:generation_tokens_total": self.iterations,
            "vllm:spec_decode_num_drafts_total": self.drafts,
            "vllm:spec_decode_num_draft_tokens_total": self.drafts,
            "vllm:spec_decode_num_accepted_tokens_total": self.accepted,
        }
        lines = [f"{name}{label} {float(value)}" for name, value in values.items()]
        position = label.replace("}", ',position="0"}')
        accepted = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        lines.append(f"{accepted}{position} {float(self.accepted)}")
        return "\n".join(["# HELP vllm:num_requests_running Number.", *lines, ""]).encode()


def gate_bytes(control: Path) -> int:
    """How often the gate was opened."""
    path = control / "gate"
    return path.stat().st_size if path.exists() else 0


async def answer(send, status: int, body: bytes, kind: bytes = b"application/json") -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def echo(scope, receive, send) -> None:
    """The body back as it comes, and the head in headers."""
    head = [
        scope["method"],
        scope["raw_path"].decode("latin-1"),
        scope["query_string"].decode("latin-1"),
        [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
    ]
    headers = [
        (b"x-head", json.dumps(head).encode()),
        (b"connection", b"x-mine"),
        (b"x-mine", b"1"),
    ]
    await send({"type": "http.response.start", "status": 207, "headers": headers})
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        more = message.get("more_body", False)
        body = message.get("body", b"")
        await send({"type": "http.response.body", "body": body, "more_body": more})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds", type=Path, required=True)
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument("--lives", type=json.loads, default=[{}])
    arguments = parser.parse_args()
    number = len(list(arguments.control.glob("life-*")))
    life = arguments.lives[min(number, len(arguments.lives) - 1)]
    if life.get("forks"):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (arguments.control / f"life-{number}").write_text(str(os.getpid()))
    print("(Worker pid=1) INFO Starting to load model /model...", flush=True)
    shards = life.get("shards", 4)
    for shard in range(shards + 1):
        sys.stderr.write(
            f"\rLoading safetensors checkpoint shards: {100 * shard // shards:3d}% Completed | "
            f"{shard}/{shards} [00:00<00:01, 4.00it/s]"
        )
        sys.stderr.flush()
        time.sleep(life.get("load_s", 0.0) / shards)
        while life.get("gated") and shard == 1 and not gate_bytes(arguments.control):
            time.sleep(0.01)
        if life.get("crash") == "loading" and shard == 1:
            print("\nValueError: no such tensor", flush=True)
            sys.exit(3)
    sys.stderr.write("\n")  # as a bar that is full
    sys.stderr.flush()
    if "compiles_s" in life:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["sh", "-c", "while :; do :; done"], timeout=life["compiles_s"])
    while life.get("hangs"):
        pass
    engine = Engine(arguments.control, life.get("wedged", False))
    config = uvicorn.Config(engine, uds=str(arguments.uds), log_level="warning")
    server = uvicorn.Server(config)
    if life.get("ignore_term"):
        server.handle_exit = lambda *_: None
    server.run()


if __name__ == "__main__":
    main()
