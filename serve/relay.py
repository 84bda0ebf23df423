"""The relay: requests and answers pass as raw bytes between a client and the engine's socket.

Nothing is decoded, joined or held back but an error that says that the engine is dead. A client
that goes away ends the request at the engine; an engine that goes away ends the answer with an
error that the client can see: an error event where an event stream can take one, else a connection
closed before its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from serve.http_errors import Refusal
from serve.keys import Key
from serve.protocol import Protocol
from serve.upstream import EngineGone, Headers, Upstream

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Of one connection only (RFC 9110, 7.6.1): each side of a relay has its own.
HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"expect",  # uvicorn has answered it
    )
)
REQUEST_ID = b"x-request-id"  # vLLM takes it as the request's name
# The engine's name of a request, at the start of an answer. In generated text quotes are escaped.
ENGINE_ID = re.compile(rb'"(?:request_)?id": ?"([A-Za-z0-9._:-]{1,192})"')
ENGINE_ID_BYTES = 512
# vLLM's error once its core is dead, just before it ends: 500, or an event. The request can be sent
# again, so its client is told that the engine is gone. Generated text has its quotes escaped.
DEAD_WORDS = b"EngineCore encountered an issue"
ENGINE_DEAD = re.compile(rb'"message": ?"' + DEAD_WORDS)
MAX_ERROR_BYTES = 4096
LAST_EVENT = b"data: [DONE]\n\n"
SWEEP_S = 1.0
MIN_UPLOAD_BYTES_PER_S = 16384  # of a request's body on the whole, after a grace
# Of a refused request's body, read so that its client can read the answer.
DISCARD_S = 2.0
DISCARD_BYTES = 2**25


class BodyTooLarge(Exception):
    """More came than was announced or allowed."""


class ClientGone(Exception):
    """The client closed its connection."""


class ClientSlow(Exception):
    """The client sends nothing of its request's body any more, or too little; which."""


class Outcome(StrEnum):
    """How a request ended."""

    DONE = "done"
    CLIENT_GONE = "client gone"
    CLIENT_SLOW = "client slow"
    ENGINE_LOST = "engine lost"
    REFUSED = "refused"
    FAILED = "failed"  # by a fault of ours


@dataclass(eq=False)
class Flight:
    """One request on its way. Times are of time.monotonic(), 0.0 for not yet or not now."""

    path: str
    work: bool
    method: str = ""
    request_id: str = ""
    client_named: bool = False  # request_id is the client's
    engine_id: str = ""  # by which the engine's own lines know it
    key: Key | None = None
    started_s: float = field(default_factory=time.monotonic)
    first_byte_s: float = (
        0.0  # of the answer's body; comments that keep a stream alive do not count
    )
    receiving_since_s: float = 0.0
    received_s: float = 0.0  # seconds that the parts of the body were waited for
    sending_since_s: float = 0.0  # without a byte that the client took, as far as was looked
    num_bytes_left: int = 0  # that it had not taken by then
    num_bytes_in: int = 0  # of the body, as far as it has come
    num_bytes_out: int = 0
    status: int = 0
    is_stream: bool = False
    tail: bytes = b""  # of the answer's body, as long as LAST_EVENT
    uploaded: bool = False  # the request's body has come whole
    slow: bool = False
    engine_dead: bool = False  # as the engine said in the middle of a stream
    outcome: Outcome = Outcome.FAILED
    connection: Protocol | None = None
    upstream: Upstream | None = None

    @property
    def waits_for_engine(self) -> bool:
        """Whether the next step is the engine's, not the client's."""
        return self.work and not self.receiving_since_s and not self.sending_since_s

    def take(self, part: bytes) -> bool:
        """Pass on a part of an answer without a length; whether the client keeps up."""
        assert self.connection is not None
        if DEAD_WORDS in part or self.engine_dead:
            part = self._before_death(part)
            if not part:
                return True
        keeps_up = self.connection.write_chunk(part)
        self.count(part)
        return keeps_up

    def _before_death(self, part: bytes) -> bytes:
        """The events before the one that says that the engine is dead."""
        if self.engine_dead:
            return b""
        found = ENGINE_DEAD.search(part) if self.is_stream else None
        if found is None:
            return part
        self.engine_dead = True
        return b"".join(part[: found.start()].rpartition(b"\n\n")[:2])

    def count(self, part: bytes) -> None:
        """Note that a part of the answer went its way."""
        if not self.first_byte_s and not part.startswith(b":"):
            self.first_byte_s = time.monotonic()
            if self.work and (found := ENGINE_ID.search(part, 0, ENGINE_ID_BYTES)):
                self.engine_id = found[1].decode()
        self.num_bytes_out += len(part)
        size = len(LAST_EVENT)
        self.tail = part[-size:] if len(part) >= size else (self.tail + part)[-size:]


def is_work(method: str, path: str) -> bool:
    """Whether the engine must compute for it: what a drain waits for and the watchdog counts."""
    is_light = path.startswith(("/tokenize", "/detokenize", "/ping", "/health"))
    return method == "POST" and not is_light and not path.endswith("/render")


def announced_bytes(scope: Message) -> int:
    """The length that a request's head gives for its body; 0 where it gives none."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
    return 0


def kept_headers(headers: Headers) -> Headers:
    """Headers without those that belong to one connection; names in lower case.

    The length stays even where the connection's header names it: what it counts is passed on.
    """
    lower = [(name.lower(), value) for name, value in headers]
    named = {
        token.strip().lower()
        for name, value in lower
        if name == b"connection"
        for token in value.split(b",")
    } - {b"content-length"}
    return [(n, v) for n, v in lower if n not in HOP_BY_HOP and n not in named]


def is_chunked(scope: Message) -> bool:
    """Whether a request's body has no length but an end."""
    return any(name == b"transfer-encoding" for name, _ in scope["headers"])


def request_target(scope: Message) -> bytes:
    """Path and query as the client sent them."""
    query = scope["query_string"]
    return scope["raw_path"] + (b"?" + query if query else b"")


class Relay:
    """Passes requests to an HTTP server on a unix socket.

    Args:
        socket_path: where the engine listens; it may be absent for now.
        slow_client_s: a client that takes or sends no byte for so long is let go; so is one whose
            body, waited for longer than that, comes at less than MIN_UPLOAD_BYTES_PER_S.
        lost: what to tell a client whose request the engine dropped.
        max_body_bytes: of a request; a longer one is 413.
        hidden: headers of requests that the engine does not get.
    """

    def __init__(
        self,
        socket_path: Path,
        slow_client_s: float,
        lost: Callable[[], Refusal],
        max_body_bytes: int = 2**40,
        hidden: frozenset[bytes] = frozenset(),
    ) -> None:
        self.flights: set[Flight] = set()
        self._max_body_bytes, self._hidden = max_body_bytes, hidden | {REQUEST_ID}
        self._socket_path, self._slow_client_s, self._lost = socket_path, slow_client_s, lost
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to look for slow clients; to be called in the running loop."""
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """End what `start` began."""
        await end_quietly(self._sweeper)

    @property
    def num_working(self) -> int:
        """Requests in flight that the engine computes for."""
        return sum(flight.work for flight in self.flights)

    @property
    def num_waiting(self) -> int:
        """Requests whose next step is the engine's."""
        return sum(flight.waits_for_engine for flight in self.flights)

    async def __call__(self, scope: Message, receive: Receive, send: Send, flight: Flight) -> None:
        """Relay one HTTP request. `flight` is filled in as it goes."""
        flight.connection = scope["state"]["connection"]
        flight.receiving_since_s = time.monotonic()
        self.flights.add(flight)
        upload: asyncio.Task[None] | None = None
        try:
            upstream = flight.upstream = await Upstream.open(self._socket_path, flight.method)
            upstream.send_head(
                flight.method, request_target(scope), self._request_headers(scope, flight)
            )
            upload = asyncio.create_task(self._upload(receive, upstream, flight, is_chunked(scope)))
            await self._pass_answer(upstream, send, flight)
            flight.outcome = Outcome.CLIENT_SLOW if flight.slow else Outcome.DONE
        except (ClientGone, ClientSlow, BodyTooLarge, EngineGone, OSError) as error:
            await end_quietly(upload)
            await self._end_early(error, receive, send, flight)
        finally:
            self.flights.discard(flight)  # first: whatever happens below, its place is free
            if flight.upstream:
                flight.upstream.abort()
            await end_quietly(upload)

    def _request_headers(self, scope: Message, flight: Flight) -> Headers:
        headers = [h for h in kept_headers(scope["headers"]) if h[0] not in self._hidden]
        if flight.client_named:
            headers.append((REQUEST_ID, flight.request_id.encode()))
        if is_chunked(scope):
            headers.append((b"transfer-encoding", b"chunked"))
        headers.append((b"connection", b"close"))
        return headers

    async def _upload(
        self, receive: Receive, upstream: Upstream, flight: Flight, chunked: bool
    ) -> None:
        """Pass on the request's body, then wait for the client to go away."""
        more = True
        with contextlib.suppress(EngineGone):  # `_pass_answer` sees it, too
            while more:
                since = flight.receiving_since_s = time.monotonic()
                message = await receive()
                flight.receiving_since_s = 0.0
                flight.received_s += time.monotonic() - since
                if message["type"] == "http.disconnect":
                    upstream.abort(ClientGone())
                    return
                more, part = message.get("more_body", False), message.get("body", b"")
                flight.num_bytes_in += len(part)
                if flight.num_bytes_in > self._max_body_bytes:
                    upstream.abort(BodyTooLarge())
                    return
                if part and chunked:
                    part = b"%x\r\n%b\r\n" % (len(part), part)
                if part:
                    await upstream.send(part)
            flight.uploaded = True
            if chunked:
                await upstream.send(b"0\r\n\r\n")
        await until_gone(receive)
        upstream.abort(ClientGone())

    async def _pass_answer(self, upstream: Upstream, send: Send, flight: Flight) -> None:
        await upstream.head()
        error = await self._read_error(upstream)
        flight.status = upstream.status
        flight.is_stream = any(
            name == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in upstream.headers
        )
        headers = [h for h in kept_headers(upstream.headers) if h[0] != REQUEST_ID]
        headers.append((REQUEST_ID, flight.request_id.encode()))
        await send({"type": "http.response.start", "status": flight.status, "headers": headers})
        if any(name == b"content-length" for name, _ in headers) or not upstream.has_body:
            while part := error or await upstream.read():
                error = b""
                flight.count(part)
                await self._send(send, flight, part)
        else:
            while not await upstream.pass_to(flight.take):
                await self._send(send, flight, b"")
            if flight.engine_dead:
                raise EngineGone("the engine says that it is dead")
        await self._send(send, flight, b"", more=False)

    async def _read_error(self, upstream: Upstream) -> bytes:
        """The body of an answer that may say that the engine is dead, b"" of all others.

        Raises:
            EngineGone: it does.
        """
        named = dict(upstream.headers).get(b"content-length", b"0")
        if upstream.status != 500 or not 0 < int(named) <= MAX_ERROR_BYTES:
            return b""
        body = b""
        while part := await upstream.read():
            body += part
        if ENGINE_DEAD.search(body):
            raise EngineGone("the engine says that it is dead")
        return body

    async def _send(self, send: Send, flight: Flight, part: bytes, more: bool = True) -> None:
        """Send, and wait until the client takes more."""
        # For the sweep: a timeout for each part would cost more than the part.
        flight.sending_since_s = time.monotonic()
        await send({"type": "http.response.body", "body": part, "more_body": more})
        flight.sending_since_s = 0.0

    async def _end_early(
        self, error: Exception, receive: Receive, send: Send, flight: Flight
    ) -> None:
        """Say that the answer will not come or go on, as far as it still can be said."""
        refusal = self._lost()
        flight.outcome = Outcome.ENGINE_LOST
        if isinstance(error, ClientGone):
            flight.outcome = Outcome.CLIENT_SLOW if flight.slow else Outcome.CLIENT_GONE
            if flight.tail == LAST_EVENT:  # OpenAI's client leaves there
                flight.outcome = Outcome.DONE
            return
        if isinstance(error, BodyTooLarge):
            refusal = Refusal(413, f"the body has more than {self._max_body_bytes} bytes")
            flight.outcome = Outcome.REFUSED
        elif isinstance(error, ClientSlow):
            refusal = Refusal(408, str(error))
            flight.outcome = Outcome.CLIENT_SLOW
        if not flight.status:
            await answer(refusal, flight, receive, send)
        elif flight.is_stream and (not flight.tail or flight.tail.endswith(b"\n\n")):
            await self._send(send, flight, refusal.event(flight.path), more=False)
        elif flight.connection:
            # Closed without the end that the client waits for; what was sent still arrives.
            flight.sending_since_s = time.monotonic()
            flight.connection.close()
            await until_gone(receive)

    async def _sweep(self) -> None:
        """Let go of clients that take or send nothing."""
        while True:
            await asyncio.sleep(min(SWEEP_S, self._slow_client_s / 2))
            now = time.monotonic()
            for flight in list(self.flights):
                if flight.sending_since_s and flight.connection:
                    self._judge_taking(flight, flight.connection, now)
                if flight.receiving_since_s and flight.upstream:
                    self._judge_upload(flight, flight.upstream, now)

    def _judge_taking(self, flight: Flight, connection: Protocol, now: float) -> None:
        # Nothing is written while a flight waits: any change is what the client took. Whether the
        # kernel takes more would say little: it does so when a third of its megabytes is free.
        left = connection.num_bytes_left()
        if left != flight.num_bytes_left:
            flight.num_bytes_left, flight.sending_since_s = left, now
        elif now - flight.sending_since_s > self._slow_client_s:
            flight.slow = True
            connection.abort()

    def _judge_upload(self, flight: Flight, upstream: Upstream, now: float) -> None:
        grace_s, waited_s = self._slow_client_s, now - flight.receiving_since_s
        received_s = flight.received_s + waited_s
        if waited_s > grace_s:
            upstream.abort(ClientSlow(f"nothing of the body came for {grace_s:g} s"))
        elif received_s > grace_s + flight.num_bytes_in / MIN_UPLOAD_BYTES_PER_S:
            text = f"{flight.num_bytes_in} bytes of the body came in {received_s:.1f} s"
            rule = f"at least {MIN_UPLOAD_BYTES_PER_S} bytes/s after the first {grace_s:g} s"
            upstream.abort(ClientSlow(f"{text}; {rule}"))


async def until_gone(receive: Receive) -> None:
    """Wait until the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(refusal: Refusal, flight: Flight, receive: Receive, send: Send) -> None:
    """Answer with a refusal, and close the connection.

    What still comes of the request is read and dropped for a while: a client whose bytes nobody
    takes gets a reset, and not the answer.
    """
    flight.status = refusal.status
    body = refusal.body(flight.path)
    headers = [*refusal.headers(body), (REQUEST_ID, flight.request_id.encode())]
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    num_bytes, more = 0, not flight.uploaded
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while more and num_bytes < DISCARD_BYTES:
                message = await receive()
                more = message.get("more_body", False)
                num_bytes += len(message.get("body", b""))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def end_quietly(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task and wait for its end."""
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
