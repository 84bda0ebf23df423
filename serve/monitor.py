"""Looks at the engine and the GPUs every few seconds: the latest numbers, and an hour of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from serve.engine_metrics import EngineMetrics, read_metrics
from serve.faults import FaultKind, Faults
from serve.gpus import Gpu, driver_version, load_nvml, read_gpus
from serve.mtp import MtpTruth, value
from serve.supervisor import Supervisor
from serve.threads import in_thread
from serve.traffic import Traffic

POINTS = 720
FETCH_S = 5.0
NVML_S = 10.0


@dataclass(frozen=True)
class Point:
    """One look. None: not known, or nothing happened to measure."""

    at_unix_s: float
    generation_tok_s: float | None = None
    prompt_tok_s: float | None = None
    ttft_ms: float | None = None  # median of the answers that began to come and ended since
    acceptance_rate: float | None = None
    running: float | None = None
    waiting: float | None = None
    kv_cache_usage: float | None = None
    power_w: float | None = None  # of all GPUs
    temperature_c: float | None = None  # of the hottest


@dataclass
class Seen:
    """The newest of everything."""

    metrics: EngineMetrics = field(default_factory=EngineMetrics)
    gpus: list[Gpu] | None = None
    record: dict[str, Any] | None = None
    points: deque[Point] = field(default_factory=lambda: deque(maxlen=POINTS))


class Monitor:
    """Reads, never decides: the watchdog does. `run` ends with its task.

    Args:
        load_record: the file in which the engine says what it loaded.
        num_speculative_tokens: as configured; 0 is off.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        traffic: Traffic,
        faults: Faults,
        load_record: Path | None,
        num_speculative_tokens: int,
        interval_s: float = 5.0,
        nvml: Callable[[], Any] = load_nvml,
    ) -> None:
        self.seen = Seen()
        self.driver: str | None = None
        self._supervisor, self._traffic, self._faults = supervisor, traffic, faults
        self._record_path, self._interval_s = load_record, interval_s
        self._speculates = num_speculative_tokens > 0
        self._mtp = MtpTruth(num_speculative_tokens, faults)
        self._load_nvml, self._nvml, self._nvml_loaded = nvml, None, False
        self._nvml_read: asyncio.Future[list[Gpu] | None] | None = None
        self._at_s = self._page_at_s = time.monotonic()
        self._life = self._num_failed = 0

    async def run(self) -> None:
        """Look until cancelled."""
        async with self.session() as session:
            while True:
                with self._not_fatal():
                    await self._look(session)
                await asyncio.sleep(self._interval_s)

    @contextlib.contextmanager
    def _not_fatal(self) -> Iterator[None]:
        """A server that cannot be looked at still serves; that it cannot is a fault."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            text = f"{type(error).__name__}: {error}"
            self._faults.begin(FaultKind.MONITOR_BROKEN, text)
        else:
            self._faults.end(FaultKind.MONITOR_BROKEN)

    def session(self) -> aiohttp.ClientSession:
        """For requests of our own to the engine."""
        connector = aiohttp.UnixConnector(str(self._supervisor.socket_path), force_close=True)
        timeout = aiohttp.ClientTimeout(total=FETCH_S)
        return aiohttp.ClientSession(connector=connector, timeout=timeout)

    async def page(self, session: aiohttp.ClientSession) -> str | None:
        """vLLM's metrics page; None where it does not answer."""
        if not self._supervisor.serving:
            return None
        try:
            async with session.get("http://engine/metrics") as response:
                page = await response.text("utf-8", "replace")
                return page if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def _look(self, session: aiohttp.ClientSession) -> None:
        if self._supervisor.num_lives != self._life:
            self._life = self._supervisor.num_lives
            self.seen.metrics, self.seen.record = EngineMetrics(), None
        page, at_s = await self.page(session), time.monotonic()
        self._note_answer(page)
        old, now = self.seen.metrics, read_metrics(page or "")
        seconds = at_s - self._page_at_s  # more than one interval where a page failed to come
        if page:
            self.seen.metrics, self._page_at_s = now, at_s
            self._mtp.observe(now)
            self._read_record()
        await self._read_gpus()
        self.seen.points.append(self._point(old, now, seconds, self._at_s))
        self._at_s = at_s

    def _note_answer(self, page: str | None) -> None:
        """A page may fail to come once, under load; not three times in a row."""
        self._num_failed = 0 if page or not self._supervisor.serving else self._num_failed + 1
        if self._num_failed >= 3:
            text = f"the engine's /metrics gave nothing {self._num_failed} times in a row"
            self._faults.begin(FaultKind.METRICS_UNREADABLE, text)
        else:
            self._faults.end(FaultKind.METRICS_UNREADABLE)

    def _point(
        self, old: EngineMetrics, now: EngineMetrics, seconds: float, from_s: float
    ) -> Point:
        def rate(name: str) -> float | None:
            before, after = getattr(old, name), getattr(now, name)
            if before is None or after is None or after < before:
                return None
            return (after - before) / seconds

        drafted = value(now.drafted) - value(old.drafted)
        accepted = value(now.accepted) - value(old.accepted)
        ttfts = [ttft for at, ttft in self._traffic.latest_ttft_s if at > from_s]
        gpus = self.seen.gpus or []
        watts = [gpu.power_w for gpu in gpus if gpu.power_w is not None]
        degrees = [gpu.temperature_c for gpu in gpus if gpu.temperature_c is not None]
        return Point(
            at_unix_s=time.time(),
            generation_tok_s=rate("generation_tokens"),
            prompt_tok_s=rate("prompt_tokens"),
            ttft_ms=1000 * statistics.median(ttfts) if ttfts else None,
            acceptance_rate=accepted / drafted if drafted > 0 else None,
            running=now.num_running,
            waiting=now.num_waiting,
            kv_cache_usage=now.kv_cache_usage,
            power_w=sum(watts) if watts else None,
            temperature_c=max(degrees, default=None),
        )

    def _read_record(self) -> None:
        """What the engine wrote when it had loaded; it does not change in one life."""
        if self.seen.record is not None or self._record_path is None:
            return
        try:
            record = json.loads(self._record_path.read_text(encoding="utf-8"))
            if not isinstance(record, dict) or record.get("schema_version") != 1:
                raise ValueError("schema_version is not 1")
            if not all(isinstance(record.get(part, {}), dict) for part in ("target", "draft")):
                raise ValueError("target or draft is not an object")
        except (OSError, ValueError) as error:
            text = f"load record {self._record_path}: {error}"
            self._faults.begin(FaultKind.LOAD_RECORD_UNREADABLE, text)
            return
        self._faults.end(FaultKind.LOAD_RECORD_UNREADABLE)
        self.seen.record = record
        if self._speculates and "draft" not in record:
            text = "MTP is on and the load record has no draft model"
            self._faults.begin(FaultKind.MTP_NOT_LOADED, text)
        else:
            self._faults.end(FaultKind.MTP_NOT_LOADED)

    def _ask_nvml(self) -> list[Gpu] | None:
        """Runs in a thread: to load NVML can hang as well as to ask it."""
        if not self._nvml_loaded:
            self._nvml = self._load_nvml()
            self.driver = driver_version(self._nvml)
            self._nvml_loaded = True
        return read_gpus(self._nvml)

    async def _read_gpus(self) -> None:
        """A driver that hangs holds a thread, and nothing else."""
        if self._nvml_read is None:
            if self._nvml_loaded and self._nvml is None:
                return
            self._nvml_read = in_thread(self._ask_nvml)
        done, _ = await asyncio.wait((self._nvml_read,), timeout=min(self._interval_s, NVML_S))
        if not done:
            self.seen.gpus = None
            self._faults.begin(FaultKind.GPU_UNREADABLE, "NVML does not answer")
            return
        task, self._nvml_read = self._nvml_read, None
        error = task.exception()
        self.seen.gpus = None if error else task.result()
        if error:
            self._faults.begin(FaultKind.GPU_UNREADABLE, f"NVML: {error}")
        else:
            self._faults.end(FaultKind.GPU_UNREADABLE)
