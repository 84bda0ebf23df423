"""`/status.json`: everything about the service in one document.

None is not known, or not there; nothing is guessed. No prompt, output, key or header is in it.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from pydantic import BaseModel

from serve.admission import Admission
from serve.allreduce_tier import AllReduce as TierOfCards
from serve.allreduce_tier import Tier
from serve.engine_metrics import EngineMetrics
from serve.faults import FaultKind, Faults
from serve.gpus import Gpu
from serve.monitor import Monitor, Point
from serve.profiles import Profile
from serve.relay import Relay
from serve.stages import Stage
from serve.supervisor import Supervisor
from serve.traffic import Traffic
from serve.versions import Versions
from serve.watchdog import Watchdog

TIER = re.compile(r"\((host-pinned|peer-push)\)")  # as kernels/load_record.py names our own


class Progress(BaseModel):
    done: int
    total: int
    what: str


class End(BaseModel):
    """An unasked end of the engine. report: what was dumped before, on the server's disk."""

    at_unix_s: float
    reason: str
    report: str | None


class Engine(BaseModel):
    lives: int
    ends: list[End]
    stalls: int
    canaries: int
    canaries_failed: int
    owes_progress_s: float


class Requests(BaseModel):
    """in_flight: all; working: the engine computes for them; silent: no byte of answer yet.

    ttft_ms, e2el_ms: of the latest answers with status 200, at most 500.
    """

    in_flight: int
    working: int
    silent: int
    ended: dict[str, int]
    by_key: dict[str, int]
    refused: int
    ttft_ms_p50: float | None
    ttft_ms_p99: float | None
    e2el_ms_p50: float | None


class Queue(BaseModel):
    """max_*: what we take beyond that is refused. running, waiting, preemptions: vLLM's counts."""

    max_working: int
    max_num_queued_tokens: int
    queued_tokens: int
    running: int | None
    waiting: int | None
    preemptions: int | None


class Throughput(BaseModel):
    """Of the latest interval."""

    generation_tok_s: float | None
    prompt_tok_s: float | None


class KvCache(BaseModel):
    """usage: share of blocks in use. prefix_hit_rate: of tokens asked for, in this life."""

    usage: float | None
    prefix_hit_rate: float | None


class Mtp(BaseModel):
    """Of this life of the engine. acceptance_length: 1 + accepted / drafts.

    per_position: accepted tokens of each position / drafts. fault: see `faults`.
    """

    enabled: bool
    num_speculative_tokens: int
    drafts: int | None
    drafted_tokens: int | None
    accepted_tokens: int | None
    acceptance_rate: float | None
    acceptance_length: float | None
    per_position: list[float]
    fault: bool


class Demoted(BaseModel):
    """A tier that had a fault since this boot. at: ISO 8601, UTC."""

    tier: Tier
    reason: str
    at: str


class AllReduce(BaseModel):
    """As the engine recorded them. tier: of our own all-reduce, where it is used.

    chosen: what the engine was started with, of two cards; demoted_from: oldest first.
    """

    tensor_parallel_size: int | None
    paths: list[str] | None
    tier: str | None
    chosen: Tier | None = None
    demoted_from: list[Demoted] = []


class FaultEntry(BaseModel):
    kind: FaultKind
    active: bool
    count: int
    first_unix_s: float
    last_unix_s: float
    message: str


class History(BaseModel):
    """Columns of equal length: see serve/monitor.py for what each is."""

    at_unix_s: list[float]
    generation_tok_s: list[float | None]
    prompt_tok_s: list[float | None]
    ttft_ms: list[float | None]
    acceptance_rate: list[float | None]
    running: list[float | None]
    waiting: list[float | None]
    kv_cache_usage: list[float | None]
    power_w: list[float | None]
    temperature_c: list[float | None]


class Status(BaseModel):
    schema_version: int = 1
    at_unix_s: float
    uptime_s: float
    ready: bool
    stage: Stage
    stage_s: float
    progress: Progress | None
    reason: str | None
    profile: dict[str, str | int | float | bool]
    engine: Engine
    requests: Requests
    queue: Queue
    throughput: Throughput
    kv_cache: KvCache
    mtp: Mtp
    all_reduce: AllReduce
    gpus: list[Gpu] | None
    faults: list[FaultEntry]
    versions: Versions
    load_record: dict[str, Any] | None
    history: History


@dataclass
class Parts:
    """Who knows what."""

    profile: Profile
    versions: Versions
    supervisor: Supervisor
    relay: Relay
    admission: Admission
    watchdog: Watchdog
    traffic: Traffic
    faults: Faults
    monitor: Monitor
    started_s: float
    tier_of_cards: TierOfCards | None = None  # None: not two cards


def build_status(parts: Parts, since_unix_s: float = 0.0) -> Status:
    """The document now; of the history what is newer than `since_unix_s`."""
    supervisor, monitor = parts.supervisor, parts.monitor
    now, metrics = time.monotonic(), monitor.seen.metrics
    points = [p for p in monitor.seen.points if p.at_unix_s > since_unix_s]
    latest = monitor.seen.points[-1] if monitor.seen.points else None
    progress = supervisor.progress
    ends = [
        End(at_unix_s=e.at_unix_s, reason=e.reason, report=str(e.report) if e.report else None)
        for e in supervisor.ends
    ]
    return Status(
        at_unix_s=time.time(),
        uptime_s=now - parts.started_s,
        ready=supervisor.ready,
        stage=supervisor.stage,
        stage_s=now - supervisor.stage_since_s,
        progress=progress
        and Progress(done=progress.done, total=progress.total, what=progress.what),
        reason=supervisor.failure or (ends[-1].reason if ends else None),
        profile=profile_entry(parts.profile),
        engine=Engine(
            lives=supervisor.num_lives,
            ends=ends,
            stalls=parts.watchdog.num_stalls,
            canaries=parts.watchdog.num_canaries,
            canaries_failed=parts.watchdog.num_canaries_failed,
            owes_progress_s=parts.watchdog.since_progress_s
            if supervisor.starting or parts.relay.num_waiting
            else 0.0,
        ),
        requests=requests_entry(parts),
        queue=queue_entry(parts, metrics),
        throughput=Throughput(
            generation_tok_s=latest.generation_tok_s if latest else None,
            prompt_tok_s=latest.prompt_tok_s if latest else None,
        ),
        kv_cache=KvCache(
            usage=metrics.kv_cache_usage,
            prefix_hit_rate=ratio(metrics.prefix_hits, metrics.prefix_queries),
        ),
        mtp=mtp_entry(parts.profile.num_speculative_tokens, metrics, parts.faults),
        all_reduce=all_reduce_entry(monitor.seen.record, parts.tier_of_cards),
        gpus=monitor.seen.gpus,
        faults=[
            FaultEntry(
                kind=f.kind,
                active=f.active,
                count=f.count,
                first_unix_s=f.first_unix_s,
                last_unix_s=f.last_unix_s,
                message=f.message,
            )
            for f in sorted(parts.faults.known.values(), key=lambda f: (not f.active, f.kind))
        ],
        versions=parts.versions.model_copy(update={"driver": monitor.driver}),
        load_record=monitor.seen.record,
        history=history(points),
    )


def profile_entry(profile: Profile) -> dict[str, str | int | float | bool]:
    """A profile's keys and values in force."""
    return {field.name: getattr(profile, field.name) for field in fields(profile)}


def requests_entry(parts: Parts) -> Requests:
    flights, traffic = parts.relay.flights, parts.traffic
    ttfts = [1000 * ttft for _, ttft in traffic.latest_ttft_s]
    ended: dict[str, int] = {}
    for (_, outcome), count in sorted(traffic.requests.items()):
        ended[outcome] = ended.get(outcome, 0) + count
    return Requests(
        in_flight=len(flights),
        working=parts.relay.num_working,
        silent=sum(f.work and not f.first_byte_s for f in flights),
        ended=ended,
        by_key=dict(traffic.by_key),
        refused=ended.get("refused", 0),
        ttft_ms_p50=quantile(ttfts, 0.5),
        ttft_ms_p99=quantile(ttfts, 0.99),
        e2el_ms_p50=quantile([1000 * s for s in traffic.latest_work_s], 0.5),
    )


def queue_entry(parts: Parts, metrics: EngineMetrics) -> Queue:
    limits = parts.admission.limits
    return Queue(
        max_working=limits.streams + limits.max_num_queued_reqs,
        max_num_queued_tokens=limits.max_num_queued_tokens,
        queued_tokens=parts.admission.queued_tokens(parts.relay.flights),
        running=whole(metrics.num_running),
        waiting=whole(metrics.num_waiting),
        preemptions=whole(metrics.num_preemptions),
    )


def mtp_entry(num_speculative_tokens: int, metrics: EngineMetrics, faults: Faults) -> Mtp:
    per_draft = ratio(metrics.accepted, metrics.drafts)
    kinds = (FaultKind.MTP_ZERO_ACCEPTANCE, FaultKind.MTP_NO_DRAFTS, FaultKind.MTP_NOT_LOADED)
    return Mtp(
        enabled=num_speculative_tokens > 0,
        num_speculative_tokens=num_speculative_tokens,
        drafts=whole(metrics.drafts),
        drafted_tokens=whole(metrics.drafted),
        accepted_tokens=whole(metrics.accepted),
        acceptance_rate=ratio(metrics.accepted, metrics.drafted),
        acceptance_length=None if per_draft is None else 1 + per_draft,
        per_position=[accepted / metrics.drafts for accepted in metrics.per_position]
        if metrics.drafts
        else [],
        fault=any(kind in faults.known and faults.known[kind].active for kind in kinds),
    )


def all_reduce_entry(
    record: dict[str, Any] | None, of_cards: TierOfCards | None = None
) -> AllReduce:
    part = next((record[p] for p in ("target", "draft") if record and p in record), {})
    paths = part.get("all_reduce")
    tiers = [found[1] for path in paths or () if (found := TIER.search(path))]
    return AllReduce(
        tensor_parallel_size=part.get("tensor_parallel_size"),
        paths=paths,
        tier=tiers[0] if tiers else None,
        chosen=of_cards.choice.tier if of_cards else None,
        demoted_from=[
            Demoted(tier=d.tier, reason=d.reason, at=d.at)
            for d in (of_cards.demotions if of_cards else ())
        ],
    )


def history(points: Sequence[Point]) -> History:
    """Points as columns."""
    columns = [field.name for field in fields(Point)]
    return History(**{name: [getattr(point, name) for point in points] for name in columns})


def ratio(part: float | None, whole: float | None) -> float | None:
    """None where nothing was counted."""
    return part / whole if part is not None and whole else None


def whole(count: float | None) -> int | None:
    """A count of vLLM's, which writes floats."""
    return None if count is None else int(count)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` of them lie; None of none."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]
