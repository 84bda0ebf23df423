"""What went through the gateway: counts by how requests ended, and times of the latest."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field

from serve.log import event
from serve.relay import Flight

LATEST = 500


@dataclass
class Traffic:
    """Filled by `ended`; read by the status and the metrics."""

    requests: Counter[tuple[int, str]] = field(default_factory=Counter)  # (status, outcome)
    by_key: Counter[str] = field(default_factory=Counter)
    num_bytes_in: int = 0
    num_bytes_out: int = 0
    latest_ttft_s: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=LATEST)
    )  # (when it ended, s), of work that got an answer
    latest_work_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))

    def ended(self, flight: Flight) -> None:
        """Count a request that ended, and log it."""
        now = time.monotonic()
        self.requests[flight.status, flight.outcome.value] += 1
        if flight.key:
            self.by_key[flight.key.name] += 1
        self.num_bytes_in += flight.num_bytes_in
        self.num_bytes_out += flight.num_bytes_out
        ttft_s = flight.first_byte_s - flight.started_s if flight.first_byte_s else None
        if flight.work and flight.status == 200:
            self.latest_work_s.append(now - flight.started_s)
            if ttft_s is not None:
                self.latest_ttft_s.append((now, ttft_s))
        event(
            "request",
            id=flight.request_id,
            engine_id=flight.engine_id or None,
            method=flight.method,
            path=shown_path(flight.path),
            status=flight.status or None,
            outcome=flight.outcome.value,
            key=flight.key.name if flight.key else None,
            duration_ms=round(1000 * (now - flight.started_s), 3),
            ttft_ms=None if ttft_s is None else round(1000 * ttft_s, 3),
            bytes_in=flight.num_bytes_in,
            bytes_out=flight.num_bytes_out,
        )


def shown_path(path: str) -> str:
    """A path as the log has it: what a client makes up is bounded and printable."""
    return "".join(c if c.isprintable() else "?" for c in path[:200])
