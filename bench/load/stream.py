"""One streamed request, read with as little work between two chunks as can be.

What is measured: bytes are timed when they leave the socket, before they are parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import msgspec

from bench.load.trace import Chunk, Kind, Speculation, Trace

DONE = b"[DONE]"


def encode(body: dict[str, Any]) -> bytes:
    """The bytes of a request; made before the clock starts, as half a million ids take a while."""
    return json.dumps(body, separators=(",", ":")).encode()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection inside: it would run between two chunks and read all traces."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


async def send(
    session: aiohttp.ClientSession,
    url: str,
    data: bytes,
    start_s: float,
    first: asyncio.Event | None = None,
    stream: Stream | None = None,
) -> Trace:
    """Post a streaming request and read it to its end. A failure is in the trace, not raised.

    Args:
        start_s: `time.perf_counter()` that is zero in the trace.
        first: set when the first token is there, or none will come.
        stream: reads the events; default: one that keeps no text.
    """
    stream = stream or Stream()
    sent_s = time.perf_counter() - start_s
    error: str | None = None
    try:
        async with session.post(
            url, data=data, headers={"Content-Type": "application/json"}
        ) as answer:
            if answer.status != 200:
                error = f"HTTP {answer.status}: {' '.join((await answer.text()).split())[:300]}"
            else:
                async for received in answer.content.iter_any():
                    stream.feed(received, time.perf_counter() - start_s)
                    if first is not None and stream.has_token:
                        first.set()
                    if stream.error:
                        break
    except (aiohttp.ClientError, OSError, TimeoutError) as failure:
        error = f"{type(failure).__name__}: {failure}".rstrip(": ")
    finally:
        if first is not None:
            first.set()
    return stream.trace(sent_s, error)


class Stream:
    """Server-sent events of one request, in chunks as they come off the socket."""

    def __init__(self) -> None:
        self.error: str | None = None
        self._rest = b""
        self._chunks: list[Chunk] = []
        self._counted = 0  # tokens up to the last chunk, by the server's running count
        self._usage: dict[str, Any] = {}
        self._metrics: dict[str, Any] = {}
        self._finish_reason: str | None = None
        self._ended = False

    @property
    def has_token(self) -> bool:
        """Whether a token came."""
        return bool(self._chunks)

    def feed(self, received: bytes, at_s: float) -> None:
        """Take bytes that came at a time; an incomplete line waits for its end."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and not self.error:
                self._event(line[5:].strip(), at_s)

    def trace(self, sent_s: float, error: str | None) -> Trace:
        """What came, and why it does not count where it does not."""
        if self._rest.removeprefix(b"data:").strip() == DONE:  # the last line need not end
            self._ended = True
        details = self._usage.get("prompt_tokens_details") or {}
        return Trace(
            sent_s=sent_s,
            chunks=tuple(self._chunks),
            prompt_tokens=self._usage.get("prompt_tokens"),
            output_tokens=self._usage.get("completion_tokens"),
            cached_tokens=details.get("cached_tokens"),
            finish_reason=self._finish_reason,
            speculation=read_speculation(self._metrics.get("speculative_decoding")),
            error=error or self.error or self._missing(),
        )

    def _missing(self) -> str | None:
        if not self._ended:
            return "the stream ended before [DONE]"
        if not self._chunks:
            return "the stream held no token"
        if "completion_tokens" not in self._usage:
            return "the stream held no usage"
        return None

    def _event(self, payload: bytes, at_s: float) -> None:
        if payload == DONE:
            self._ended = True
            return
        try:
            event = msgspec.json.decode(payload)  # a quarter of the time of json's
            if "error" in event and event["error"] is not None:
                failure = event["error"]
                message = failure.get("message") if isinstance(failure, dict) else failure
                self.error = f"error in the stream: {message}"
                return
            usage = event.get("usage") or {}
            if usage:
                self._usage = self._usage | usage
            self._metrics = event.get("metrics") or self._metrics
            for choice in event.get("choices") or ():
                self._choice(choice, usage.get("completion_tokens"), at_s)
        except (ValueError, AttributeError, TypeError):
            self.error = f"malformed stream: {payload[:80]!r}"

    def _choice(self, choice: dict[str, Any], counted: int | None, at_s: float) -> None:
        delta = choice.get("delta") or {}
        reasoning = delta.get("reasoning") or delta.get("reasoning_content")
        text = choice.get("text") or delta.get("content")
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        # A token may end inside a character: then it has no text yet, but is counted.
        grown = (counted or 0) - self._counted
        if not (reasoning or text or grown > 0):
            return
        # Of a chat, a token without text is a mark of the reasoning, not content.
        is_content = text or ("delta" not in choice and not reasoning)
        kind = Kind.CONTENT if is_content else Kind.REASONING
        self._chunks.append(Chunk(at_s, grown if counted is not None else None, kind))
        self._counted = counted if counted is not None else self._counted


def read_speculation(record: dict[str, Any] | None) -> Speculation | None:
    """What `--per-request-spec-decode-metrics` puts into the last event; None without it."""
    if not record:
        return None
    histogram = record.get("acceptance_histogram")
    return Speculation(
        num_drafts=record["num_spec_steps"],
        num_draft_tokens=record["num_draft_tokens"],
        num_accepted_tokens=record["num_accepted_draft_tokens"],
        accepted_histogram=tuple(histogram) if histogram is not None else None,
    )
