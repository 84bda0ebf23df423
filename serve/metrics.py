"""Our own Prometheus metrics, beside vLLM's on one page."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.faults import FaultKind
from serve.relay import Flight
from serve.stages import Stage
from serve.status import Parts, mtp_entry, ratio

PREFIX = "dsv4_serve_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# A prefill of 524,288 tokens takes minutes.
TTFT_BUCKETS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1200)
E2EL_BUCKETS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1200, 3600)
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Metrics:
    """The page; `observe` is told of each request that ends."""

    def __init__(self, parts: Parts) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Gathered(parts))
        self._ttft = Histogram(
            PREFIX + "time_to_first_byte_seconds",
            "From a request's arrival to the first byte of its answer's body, of work with status "
            "200.",
            buckets=TTFT_BUCKETS_S,
            registry=self._registry,
        )
        self._e2el = Histogram(
            PREFIX + "request_seconds",
            "From a request's arrival to the end of its answer, of work with status 200.",
            buckets=E2EL_BUCKETS_S,
            registry=self._registry,
        )

    def observe(self, flight: Flight, now_s: float) -> None:
        """Take the times of a request that ended."""
        if flight.work and flight.status == 200 and flight.first_byte_s:
            self._ttft.observe(flight.first_byte_s - flight.started_s)
            self._e2el.observe(now_s - flight.started_s)

    def page(self, engine_page: str | None) -> bytes:
        """Ours, then vLLM's as it came."""
        return generate_latest(self._registry) + (engine_page or "").encode()


class Gathered(Collector):
    """What others count anyway, read when it is asked for."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        yield from self._engine()
        yield from self._requests()
        yield from self._mtp()
        yield from self._gpus()
        yield from self._process()

    def describe(self) -> list[Metric]:
        return []

    def _engine(self) -> Iterator[Metric]:
        parts = self._parts
        versions = parts.versions
        info = gauge("info", "What serves; always 1.", "profile", "vllm", "commit")
        labels = [parts.profile.name, versions.vllm or "", versions.commit or ""]
        info.add_metric(labels, 1)
        yield info
        yield number("ready", "Whether a request would reach the engine.", parts.supervisor.ready)
        stage = gauge("stage", "1 for the stage that the engine is in.", "stage")
        for each in Stage:
            stage.add_metric([each.value], each is parts.supervisor.stage)
        yield stage
        lives, ends = parts.supervisor.num_lives, len(parts.supervisor.ends)
        yield total("engine_lives", "Starts of the engine.", lives)
        yield total("engine_ends", "Unasked ends of the engine.", ends)
        text = "Ends because of no progress, in a start or later."
        yield total("engine_stalls", text, parts.watchdog.num_stalls)
        canaries = counter("canaries", "Tokens asked of an idle engine.", "result")
        failed = parts.watchdog.num_canaries_failed
        canaries.add_metric(["failed"], failed)
        canaries.add_metric(["answered"], parts.watchdog.num_canaries - failed)
        yield canaries
        text = "Faults that began. Kinds: see docs/serve.md."
        began = counter("faults", text, "kind")
        active = gauge("fault_active", "1 for a kind of fault that lasts.", "kind")
        for kind in FaultKind:
            fault = parts.faults.known.get(kind)
            began.add_metric([kind.value], fault.count if fault else 0)
            active.add_metric([kind.value], bool(fault and fault.active))
        yield began
        yield active
        if parts.tier_of_cards:
            text = "Tiers of the all-reduce that failed, and what took their place."
            demoted = counter("all_reduce_demotions", text, "from", "to")
            for (failed, taken), count in sorted(parts.tier_of_cards.counts.items()):
                demoted.add_metric([failed.value, taken.value], count)
            yield demoted

    def _requests(self) -> Iterator[Metric]:
        parts = self._parts
        flights = parts.relay.flights
        requests = counter("requests", "Requests that ended.", "status", "outcome")
        for (status, outcome), count in sorted(parts.traffic.requests.items()):
            requests.add_metric([str(status), outcome], count)
        yield requests
        by_key = counter("key_requests", "Requests that ended, by name of the API key.", "key")
        for key, count in sorted(parts.traffic.by_key.items()):
            by_key.add_metric([key], count)
        yield by_key
        yield number("requests_in_flight", "Requests that are relayed now.", len(flights))
        text = "Requests that the engine computes for."
        yield number("requests_working", text, parts.relay.num_working)
        text = "Requests in work without a byte of answer."
        yield number("requests_silent", text, sum(f.work and not f.first_byte_s for f in flights))
        text = "Prompt tokens, estimated, that wait for their first answer."
        yield number("queued_tokens", text, parts.admission.queued_tokens(flights))
        passed = counter("body_bytes", "Bytes of bodies that passed.", "direction")
        passed.add_metric(["in"], parts.traffic.num_bytes_in)
        passed.add_metric(["out"], parts.traffic.num_bytes_out)
        yield passed

    def _mtp(self) -> Iterator[Metric]:
        parts = self._parts
        seen = parts.monitor.seen.metrics
        mtp = mtp_entry(parts.profile.num_speculative_tokens, seen, parts.faults)
        yield number("mtp_enabled", "Whether the engine was started with MTP.", mtp.enabled)
        rates = gauge(
            "mtp_acceptance_ratio",
            "Accepted tokens of a position per draft, in this life of the engine.",
            "position",
        )
        for position, rate in enumerate(mtp.per_position):
            rates.add_metric([str(position)], rate)
        yield rates
        per_draft = ratio(seen.accepted, seen.drafts)
        if per_draft is not None:
            text = "1 + accepted tokens / drafts, in this life of the engine."
            yield number("mtp_acceptance_length", text, 1 + per_draft)

    def _gpus(self) -> Iterator[Metric]:
        gpus = self._parts.monitor.seen.gpus or []
        for name, text, of in (
            ("gpu_power_watts", "Power that a GPU draws.", lambda g: g.power_w),
            ("gpu_temperature_celsius", "A GPU's temperature.", lambda g: g.temperature_c),
            ("gpu_memory_used_bytes", "Memory of a GPU in use.", lambda g: g.memory_used_bytes),
        ):
            family = gauge(name, text, "gpu")
            for gpu in gpus:
                if (found := of(gpu)) is not None:
                    family.add_metric([str(gpu.index)], found)
            yield family

    def _process(self) -> Iterator[Metric]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        text = "Memory of the gateway's process."
        yield number("process_resident_bytes", text, pages * PAGE_BYTES)
        descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
        yield number("process_open_fds", "Files and sockets of the gateway.", descriptors)
        yield number("process_tasks", "Tasks of the gateway's loop.", len(asyncio.all_tasks()))


def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, labels=labels)


def counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, labels=labels)


def number(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def total(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, value=value)
