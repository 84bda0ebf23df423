"""What one streamed request did, as it was seen by the client. No figure is computed here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """What a chunk carries."""

    REASONING = "reasoning"
    CONTENT = "content"


@dataclass(frozen=True)
class Chunk:
    """One event of a stream that carries tokens.

    at_s: seconds on the clock of `Trace.sent_s`. num_tokens: None where the server sends no ids.
    """

    at_s: float
    num_tokens: int | None
    kind: Kind = Kind.CONTENT


@dataclass(frozen=True)
class Speculation:
    """The server's own count of one request's drafts.

    accepted_histogram: at index i the number of drafts of which i tokens were accepted.
    """

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_histogram: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Trace:
    """One request. Counts come from the server's usage; None where it sent none.

    error: why the request counts as failed, else None. A failed one keeps the chunks that came.
    """

    sent_s: float
    chunks: tuple[Chunk, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    speculation: Speculation | None = None
    error: str | None = None

    @property
    def first_s(self) -> float | None:
        """When the first reasoning or content delta came."""
        return self.chunks[0].at_s if self.chunks else None

    @property
    def first_content_s(self) -> float | None:
        """When the first content delta came, reasoning left out."""
        return next((c.at_s for c in self.chunks if c.kind is Kind.CONTENT), None)

    @property
    def last_s(self) -> float | None:
        """When the last delta came."""
        return self.chunks[-1].at_s if self.chunks else None


def to_json(trace: Trace) -> dict[str, Any]:
    """Plain values; chunks become [at_s, num_tokens, kind], seconds to the microsecond."""
    record = asdict(trace)
    record["sent_s"] = round(trace.sent_s, 6)
    record["chunks"] = [[round(c.at_s, 6), c.num_tokens, c.kind.value] for c in trace.chunks]
    return record


def from_json(record: dict[str, Any]) -> Trace:
    """Undo `to_json`."""
    speculation = record["speculation"]
    if speculation is not None:
        histogram = speculation["accepted_histogram"]
        speculation = Speculation(
            **speculation | {"accepted_histogram": histogram and tuple(histogram)}
        )
    chunks = tuple(Chunk(at_s, count, Kind(kind)) for at_s, count, kind in record["chunks"])
    return Trace(**record | {"chunks": chunks, "speculation": speculation})
