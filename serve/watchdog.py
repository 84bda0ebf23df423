"""Notices an engine that makes no progress, and gathers what is known about it before it is ended.

Of a start, progress is any sign of work: see `serve.silence`.

Of an engine that is ready it is a change in what the engine says of its steps. It is asked for only
while *we* hold requests that wait for the engine: vLLM's own count of running requests has been
seen at 0 in a wedged engine, and a client that reads slowly or has not sent its whole request is no
fault of the engine's. An idle engine has no steps; it is asked for one token now and then. A kernel
may be compiled at the first request that needs it: while the processes work, a step may take as
long as a silent start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from serve.evidence import gather_evidence
from serve.faults import FaultKind, Faults
from serve.relay import Relay, end_quietly
from serve.silence import MAX_GAP, Silence
from serve.supervisor import Supervisor

# vLLM observes a step's histogram only when the step gives a request an output: the steps of a long
# prefill move the use of the KV cache alone, until the first token.
PROGRESS = (
    "vllm:iteration_tokens_total_count",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:kv_cache_usage_perc",
)
MAX_POLL_S = 2.0


@dataclass(frozen=True)
class WatchConfig:
    """stall_timeout_s: longest time without progress. canary_interval_s: of an idle engine.

    Of a start: start_step_timeout_s between two steps that vLLM counts, start_stall_timeout_s else,
    which is also the longest time without progress of a ready engine whose processes work.
    """

    report_dir: Path
    model: str
    stall_timeout_s: float = 120.0
    canary_interval_s: float = 300.0
    start_stall_timeout_s: float = 900.0
    start_step_timeout_s: float = 300.0


def read_progress(metrics: str) -> tuple[str, ...]:
    """The samples of a metrics page that show progress; they are compared, not computed with."""
    return tuple(
        line
        for line in metrics.splitlines()
        if line.startswith(PROGRESS) and line.partition("{")[0].partition(" ")[0] in PROGRESS
    )


class Watchdog:
    """Watches one supervisor's engine; `run` ends with its task."""

    def __init__(
        self,
        config: WatchConfig,
        supervisor: Supervisor,
        relay: Relay,
        faults: Faults | None = None,
    ) -> None:
        self.config = config
        self.num_stalls = self.num_canaries = self.num_canaries_failed = 0
        self._supervisor, self._relay = supervisor, relay
        self._faults = faults or Faults()
        self._life = 0
        self._seen: tuple[str, ...] = ()
        self._proved_s = time.monotonic()
        self._canary: asyncio.Task[None] | None = None
        timeouts = (config.stall_timeout_s, config.start_stall_timeout_s)
        self._poll_s = min(MAX_POLL_S, *(t / 8 for t in (*timeouts, config.start_step_timeout_s)))
        self._start = Silence(self._poll_s)
        # A look takes as long as the engine's answer.
        self._read_s = max(1.0, config.stall_timeout_s / 4)
        look_s = self._poll_s + self._read_s / MAX_GAP
        self._step = Silence(look_s, grace_s=config.stall_timeout_s / 4, serving=True)
        supervisor.dump = self.dump

    @property
    def since_progress_s(self) -> float:
        """Seconds for which the engine has owed progress."""
        return self._start.silent_s if self._supervisor.starting else self._step.owed_s

    async def run(self) -> None:
        """Look at the engine until cancelled."""
        connector = aiohttp.UnixConnector(str(self._supervisor.socket_path), force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            try:
                while True:
                    await self._look(session)
                    await asyncio.sleep(self._poll_s)
            finally:
                await end_quietly(self._canary)

    async def _look(self, session: aiohttp.ClientSession) -> None:
        supervisor, now = self._supervisor, time.monotonic()
        self._look_at_start()
        if not supervisor.serving or supervisor.num_lives != self._life:
            self._life, self._seen = supervisor.num_lives, ()
            self._proved_s = now
            self._step.forget()
            await end_quietly(self._canary)
            self._canary = None
            return
        if self._canary and self._canary.done():
            self._canary = None
        waiting = self._relay.num_waiting
        if waiting or self._canary:
            self._seen = await self._read(session) or self._seen
            self._look_at_step(f"{waiting} request(s)" if waiting else "a test request")
            return
        self._step.forget()
        if now - self._proved_s > self.config.canary_interval_s:
            self.num_canaries += 1
            self._proved_s = now
            self._canary = asyncio.create_task(self._ask_one_token(session))

    def _look_at_step(self, who: str) -> None:
        supervisor, step, config = self._supervisor, self._step, self.config
        step.look(supervisor.pid, self._seen)
        if not step.owed_s:
            self._proved_s = time.monotonic()
        longest_s = max(config.stall_timeout_s, config.start_stall_timeout_s)
        if step.silent_s > config.stall_timeout_s or step.owed_s > longest_s:
            self.num_stalls += 1
            supervisor.report_stall(
                f"the engine made no progress for {step.owed_s:.0f} s while {who} waited for it"
            )
            step.forget()

    def _look_at_start(self) -> None:
        supervisor, start = self._supervisor, self._start
        if not supervisor.starting:
            start.forget()
            return
        start.look(supervisor.pid, (supervisor.num_lives, supervisor.num_signs))
        config = self.config
        bound_s = config.start_stall_timeout_s
        if supervisor.counting:
            bound_s = config.start_step_timeout_s
        if start.silent_s > bound_s:
            self.num_stalls += 1
            supervisor.report_stall(
                f"the engine's start showed no sign of progress for {start.silent_s:.0f} s: "
                + supervisor.describe()
            )
            start.forget()

    async def _read(self, session: aiohttp.ClientSession) -> tuple[str, ...]:
        """What the engine says of its steps; nothing when it does not answer."""
        timeout = aiohttp.ClientTimeout(total=self._read_s)
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with session.get("http://engine/metrics", timeout=timeout) as response:
                return read_progress(await response.text())
        return ()

    async def _ask_one_token(self, session: aiohttp.ClientSession) -> None:
        body = {"model": self.config.model, "prompt": "1", "max_tokens": 1, "temperature": 0}
        timeout = aiohttp.ClientTimeout(total=None)
        try:
            async with session.post(
                "http://engine/v1/completions", json=body, timeout=timeout
            ) as response:
                answered = response.status == 200
                await response.read()
        except (aiohttp.ClientError, OSError):
            answered = False
        if answered:
            self._faults.end(FaultKind.CANARY_FAILED)
        else:
            self.num_canaries_failed += 1
            text = "an idle engine did not answer a request for one token with status 200"
            self._faults.begin(FaultKind.CANARY_FAILED, text)

    async def dump(self, reason: str) -> Path | None:
        """Write what is known of a stalled engine to a file, which takes its processes' lives."""
        supervisor = self._supervisor
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = self.config.report_dir / f"stall-{stamp}-{supervisor.pid}.json"
        # First: the requests end with the engine.
        requests = [
            {
                "path": flight.path,
                "age_s": round(time.monotonic() - flight.started_s, 3),
                "bytes_out": flight.num_bytes_out,
            }
            for flight in self._relay.flights
        ]
        evidence = await gather_evidence(supervisor.pid, supervisor.tail, supervisor.all_read)
        evidence |= {"reason": reason, "requests": requests, "progress": list(self._seen)}
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            supervisor.say(f"{path}: {error.strerror}")
            return None
        supervisor.say(f"what is known of the stalled engine is in {path}")
        return path
