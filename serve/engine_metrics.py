"""The numbers that we read from vLLM's /metrics page."""

from __future__ import annotations

import re
from dataclasses import dataclass

SAMPLE = re.compile(r"(?P<name>vllm:\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)")
POSITION = re.compile(r'position="(\d+)"')
DRAFTS = "vllm:spec_decode_num_drafts_total"
DRAFTED = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
SUMMED = {
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:time_to_first_token_seconds_count": "first_tokens",
    "vllm:num_requests_running": "num_running",
    "vllm:num_requests_waiting": "num_waiting",
    "vllm:num_preemptions_total": "num_preemptions",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    DRAFTS: "drafts",
    DRAFTED: "drafted",
    ACCEPTED: "accepted",
}
KV_USAGE = "vllm:kv_cache_usage_perc"


@dataclass(frozen=True)
class EngineMetrics:
    """None: the page has no such sample. Counters are of one life of the engine.

    first_tokens: of generation_tokens, those that a prefill gave. kv_cache_usage: share of blocks
    in use, 0 to 1. drafts: proposals; drafted, accepted: their tokens; per_position: accepted ones
    of each position.
    """

    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    first_tokens: float | None = None
    num_running: float | None = None
    num_waiting: float | None = None
    num_preemptions: float | None = None
    prefix_queries: float | None = None
    prefix_hits: float | None = None
    kv_cache_usage: float | None = None
    drafts: float | None = None
    drafted: float | None = None
    accepted: float | None = None
    per_position: tuple[float, ...] = ()


def read_metrics(page: str) -> EngineMetrics:
    """Take our numbers from a page; samples of several engines are added, use is the largest."""
    sums: dict[str, float] = {}
    usage: float | None = None
    positions: dict[int, float] = {}
    for line in page.splitlines():
        if not line.startswith("vllm:") or not (match := SAMPLE.match(line)):
            continue
        name, value = match["name"], float(match["value"])
        if name in SUMMED:
            sums[SUMMED[name]] = sums.get(SUMMED[name], 0.0) + value
        elif name == KV_USAGE:
            usage = value if usage is None else max(usage, value)
        elif name == PER_POSITION and (found := POSITION.search(match["labels"] or "")):
            at = int(found[1])
            positions[at] = positions.get(at, 0.0) + value
    in_order = tuple(value for _, value in sorted(positions.items()))
    return EngineMetrics(**sums, kv_cache_usage=usage, per_position=in_order)
