"""vLLM's counters that a load run reads before and after each round."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from bench.prometheus import parse_samples

_NAMES = {
    "generation_tokens": "vllm:generation_tokens_total",
    "num_preemptions": "vllm:num_preemptions_total",
    "prefix_cache_queries": "vllm:prefix_cache_queries_total",
    "prefix_cache_hits": "vllm:prefix_cache_hits_total",
    "num_drafts": "vllm:spec_decode_num_drafts_total",
    "num_draft_tokens": "vllm:spec_decode_num_draft_tokens_total",
    "num_accepted_tokens": "vllm:spec_decode_num_accepted_tokens_total",
}
_UNFINISHED = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_POSITION = re.compile(
    r'^vllm:spec_decode_num_accepted_tokens_per_pos_total\{.*position="(\d+)".*\}\s+(\S+)', re.M
)


@dataclass(frozen=True)
class Counters:
    """Counts since the engine started; None where it does not export one."""

    generation_tokens: int | None = None
    num_preemptions: int | None = None
    prefix_cache_queries: int | None = None
    prefix_cache_hits: int | None = None
    num_drafts: int | None = None
    num_draft_tokens: int | None = None
    num_accepted_tokens: int | None = None
    accepted_per_position: tuple[int, ...] | None = None

    def combined(self, other: Counters, sign: int) -> Counters:
        """Entry by entry self + sign * other, None where either is None."""
        mine, theirs = asdict(self), asdict(other)
        return Counters(**{name: _add(mine[name], theirs[name], sign) for name in mine})

    def since(self, earlier: Counters) -> Counters:
        """Return the difference to an earlier reading.

        Raises:
            ValueError: a counter went backwards, so the engine restarted in between.
        """
        difference = self.combined(earlier, -1)
        for name, value in asdict(difference).items():
            values = value if isinstance(value, tuple) else (value,)
            if any(v is not None and v < 0 for v in values):
                raise ValueError(f"counter {name} went backwards; the engine restarted")
        return difference


def _add(a: Any, b: Any, sign: int) -> Any:
    if a is None or b is None:
        return None
    if isinstance(a, tuple):
        size = max(len(a), len(b))
        pad = [list(t) + [0] * (size - len(t)) for t in (a, b)]
        return tuple(x + sign * y for x, y in zip(*pad, strict=True))
    return a + sign * b


def total(parts: list[Counters]) -> Counters:
    """Sum over rounds; all None of none."""
    if not parts:
        return Counters()
    result = parts[0]
    for part in parts[1:]:
        result = result.combined(part, 1)
    return result


def read(page: str) -> Counters:
    """Counters in the text of a /metrics page.

    Raises:
        ValueError: the page is not Prometheus text.
    """
    samples = parse_samples(page)
    values: dict[str, Any] = {
        name: int(samples[metric]) if metric in samples else None for name, metric in _NAMES.items()
    }
    positions: dict[int, int] = {}
    for position, count in _POSITION.findall(page):
        positions[int(position)] = positions.get(int(position), 0) + int(float(count))
    if positions:
        values["accepted_per_position"] = tuple(positions[i] for i in sorted(positions))
    return Counters(**values)


def unfinished(page: str) -> int | None:
    """Requests that the engine runs or keeps waiting; None where the page does not tell.

    Raises:
        ValueError: the page is not Prometheus text.
    """
    samples = parse_samples(page)
    told = [samples[name] for name in _UNFINISHED if name in samples]
    return int(sum(told)) if told else None


def from_json(record: dict[str, Any]) -> Counters:
    """Undo `dataclasses.asdict` and JSON."""
    positions = record["accepted_per_position"]
    return Counters(**record | {"accepted_per_position": positions and tuple(positions)})
