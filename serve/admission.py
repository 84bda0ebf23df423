"""How much work is taken before the engine has caught up: by requests, by tokens, by size.

The bodies are not read for it: tokens are estimated from bytes, and the rates behind Retry-After
are measured in the same estimate, so that its error cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve.http_errors import Refusal
from serve.keys import Key
from serve.relay import Flight

BYTES_PER_TOKEN = 4
WEIGHT = 0.2  # of the newest request in a running mean
MAX_RETRY_AFTER_S = 120


@dataclass(frozen=True)
class AdmissionLimits:
    """streams: requests that the engine runs together. The others bound what waits beside them."""

    streams: int = 4
    max_num_queued_reqs: int = 16
    max_num_queued_tokens: int = 1_048_576
    max_body_bytes: int = 16 * 2**20


class Admission:
    """Judges requests by those in flight; learns from each that ends."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self.num_refused = 0
        self._service_s: float | None = None
        self._tokens_per_s: float | None = None

    def refusal(
        self, num_bytes: int, flights: set[Flight], key: Key | None = None
    ) -> Refusal | None:
        """Why a request with a body of that size is not taken now; None when it is.

        A request is always taken when no other works, however long its prompt. Of those in flight
        only what has come is counted: one that announced much and sends little keeps nobody away.
        """
        limits = self.limits
        if num_bytes > limits.max_body_bytes:
            self.num_refused += 1
            return Refusal(413, f"the body has {num_bytes} bytes; at most {limits.max_body_bytes}")
        working = [flight for flight in flights if flight.work]
        if key and key.max_concurrency is not None:
            own = sum(flight.key == key for flight in working)
            if own >= key.max_concurrency:
                most_own = f"at most {key.max_concurrency}"
                text = f"{own} requests of key {key.name} are in work; {most_own}"
                return self._busy(text, self._service_s or 1.0)
        most = limits.streams + limits.max_num_queued_reqs
        if len(working) >= most:
            wait_s = (self._service_s or 1.0) * (len(working) - most + 1) / limits.streams
            return self._busy(
                f"{len(working)} requests are in work or wait; at most {most}", wait_s
            )
        waiting = waiting_bytes(flights)
        tokens = (waiting + num_bytes) // BYTES_PER_TOKEN
        if waiting and tokens > limits.max_num_queued_tokens:
            wait_s = (tokens - limits.max_num_queued_tokens) / (self._tokens_per_s or 1000.0)
            text = f"about {tokens} prompt tokens would wait; at most"
            return self._busy(f"{text} {limits.max_num_queued_tokens}", wait_s)
        return None

    def queued_tokens(self, flights: set[Flight]) -> int:
        """Prompt tokens that wait for their first answer, estimated."""
        return waiting_bytes(flights) // BYTES_PER_TOKEN

    def learn(self, flight: Flight, now_s: float) -> None:
        """Take the rates of a request that ended; one without an answer, or with an error, which
        is quicker than work, teaches nothing."""
        if not flight.work or flight.status != 200 or not flight.first_byte_s:
            return
        self._service_s = mean(self._service_s, now_s - flight.started_s)
        seconds = max(flight.first_byte_s - flight.started_s, 1e-3)
        tokens = flight.num_bytes_in / BYTES_PER_TOKEN
        self._tokens_per_s = mean(self._tokens_per_s, tokens / seconds)

    def _busy(self, text: str, wait_s: float) -> Refusal:
        self.num_refused += 1
        wait = max(1, min(MAX_RETRY_AFTER_S, round(wait_s)))
        return Refusal(429, f"too much work: {text}", wait)


def waiting_bytes(flights: set[Flight]) -> int:
    """Bytes that have come of the prompts that wait for their first answer."""
    return sum(f.num_bytes_in for f in flights if f.work and not f.first_byte_s)


def mean(old: float | None, new: float) -> float:
    """A running mean that starts with its first value."""
    return new if old is None else old + WEIGHT * (new - old)
