"""The relay: requests and answers pass as raw bytes between a client and the engine's socket.

Nothing is decoded, joined or held back. A client that goes away ends the request at the engine; an
engine that goes away ends the answer with an error that the client can see: an error event where an
event stream can take one, else a connection closed before its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from serve.http_errors import Refusal

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
OWN_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")  # aiohttp adds no such
CHUNK_BYTES = 2**16
SWEEP_S = 1.0


class BodyTooLarge(Exception):
    """More came than was announced or allowed."""


class ClientGone(Exception):
    """The client closed its connection, or takes nothing any more."""


class EngineGone(Exception):
    """The engine closed its connection before the answer's end."""


@dataclass(eq=False)
class Flight:
    """One request on its way. Times are of time.monotonic(), 0.0 for not yet."""

    path: str
    work: bool
    task: asyncio.Task[None] | None = None
    started_s: float = field(default_factory=time.monotonic)
    first_byte_s: float = 0.0
    sending_since_s: float = 0.0
    num_bytes_in: int = 0
    num_bytes_out: int = 0
    slow: bool = False
    body: Body | None = None

    @property
    def waits_for_engine(self) -> bool:
        """Whether the next step is the engine's: the request is sent, the client takes bytes."""
        sent = self.body is None or self.body.ended.is_set()
        return self.work and sent and not self.sending_since_s


class Body:
    """A request's body, passed on as it comes."""

    def __init__(self, receive: Receive, flight: Flight, max_bytes: int) -> None:
        self._receive, self._flight, self._max_bytes = receive, flight, max_bytes
        self.num_bytes = 0
        self.too_large = False
        self.ended = asyncio.Event()
        self.client_gone = False

    async def parts(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.client_gone = True
                self.ended.set()
                raise ClientGone
            more = message.get("more_body", False)
            if part := message.get("body", b""):
                self.num_bytes += len(part)
                self._flight.num_bytes_in = max(self._flight.num_bytes_in, self.num_bytes)
                if self.num_bytes > self._max_bytes:
                    self.too_large = True
                    raise BodyTooLarge
                yield part
        self.ended.set()

    async def wait_until_client_gone(self) -> None:
        await self.ended.wait()
        while not self.client_gone:
            self.client_gone = (await self._receive())["type"] == "http.disconnect"


def is_work(method: str, path: str) -> bool:
    """Whether the engine must compute for it: what a drain waits for and the watchdog counts."""
    return method == "POST" and not path.startswith(("/tokenize", "/detokenize", "/ping"))


def announced_bytes(scope: Message) -> int:
    """The length that a request's head gives for its body; 0 where it gives none."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
    return 0


def kept_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers without those that belong to one connection; names in lower case."""
    lower = [(name.lower(), value) for name, value in headers]
    named = {
        token.strip().lower()
        for name, value in lower
        if name == b"connection"
        for token in value.split(b",")
    }
    return [(n, v) for n, v in lower if n not in HOP_BY_HOP and n not in named]


def text(value: bytes) -> str:
    """A header's value such that aiohttp, which writes UTF-8, writes the same bytes.

    Other bytes than UTF-8 are rare enough in headers to be read as Latin-1 and written as UTF-8.
    """
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


class Relay:
    """Passes requests to an HTTP server on a unix socket.

    Args:
        socket_path: where the engine listens; it may be absent for now.
        slow_client_s: a client that takes no byte for so long is let go.
        lost: what to tell a client whose request the engine dropped.
        max_body_bytes: of a request; a longer one is 413.
        on_end: called with each request that ends.
    """

    def __init__(
        self,
        socket_path: Path,
        slow_client_s: float,
        lost: Callable[[], Refusal],
        max_body_bytes: int = 2**40,
        on_end: Callable[[Flight], None] = lambda flight: None,
    ) -> None:
        self._max_body_bytes, self._on_end = max_body_bytes, on_end
        self.flights: set[Flight] = set()
        self.num_clients_gone = self.num_engine_lost = self.num_slow_clients = 0
        self._socket_path, self._slow_client_s, self._lost = socket_path, slow_client_s, lost
        self._session: aiohttp.ClientSession | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the client side; to be called in the running loop."""
        # Decoding takes minutes and prefill too: the watchdog, not a timeout, judges the engine.
        timeout = aiohttp.ClientTimeout(total=None, connect=10)
        self._session = aiohttp.ClientSession(
            # An idle connection may be closed by the engine just when it is taken for a POST, which
            # must not be sent twice: each request has its own. On a unix socket that is cheap.
            connector=aiohttp.UnixConnector(str(self._socket_path), limit=0, force_close=True),
            timeout=timeout,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=OWN_HEADERS,
            read_bufsize=CHUNK_BYTES,
            max_line_size=CHUNK_BYTES,
            max_field_size=CHUNK_BYTES,
        )
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Close what is open."""
        if self._sweeper:
            self._sweeper.cancel()
        if self._session:
            await self._session.close()

    @property
    def num_working(self) -> int:
        """Requests in flight that the engine computes for."""
        return sum(flight.work for flight in self.flights)

    @property
    def num_waiting(self) -> int:
        """Requests whose next step is the engine's."""
        return sum(flight.waits_for_engine for flight in self.flights)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Relay one HTTP request (an ASGI application)."""
        flight = Flight(scope["path"], is_work(scope["method"], scope["path"]))
        flight.num_bytes_in = announced_bytes(scope)
        body = flight.body = Body(receive, flight, self._max_body_bytes)
        flight.task = asyncio.create_task(self._exchange(scope, body, send, flight))
        watcher = asyncio.create_task(body.wait_until_client_gone())
        self.flights.add(flight)
        try:
            await asyncio.wait((flight.task, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not flight.task.done():
                self.num_clients_gone += 1
        finally:
            self.flights.discard(flight)
            self._on_end(flight)
            flight.task.cancel()
            watcher.cancel()
            results = await asyncio.gather(flight.task, watcher, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _exchange(self, scope: Message, body: Body, send: Send, flight: Flight) -> None:
        last = b""
        started = is_stream = False
        try:
            async with self._request(scope, body) as response:
                headers = kept_headers(list(response.raw_headers))
                is_stream = response.content_type == "text/event-stream"
                flight.first_byte_s = time.monotonic()
                started = True
                await send(
                    {"type": "http.response.start", "status": response.status, "headers": headers}
                )
                content = response.content
                while part := await content.readany():
                    flight.num_bytes_out += len(part)
                    last = part if len(part) > 1 else last[-1:] + part
                    # Set for the sweep only: a timeout for each part would cost more than the part.
                    flight.sending_since_s = time.monotonic()
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                    flight.sending_since_s = 0.0
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            self.num_clients_gone += 1
        except (TimeoutError, aiohttp.ClientError, OSError, BodyTooLarge) as error:
            if body.client_gone:  # aiohttp wraps what the body's generator raised
                self.num_clients_gone += 1
                return
            if body.too_large:
                refusal = Refusal(413, f"the body has more than {self._max_body_bytes} bytes")
                await self._tell(scope["path"], send, started, False, error, refusal)
                return
            self.num_engine_lost += 1
            await self._tell(
                scope["path"], send, started, is_stream and last[-2:] in (b"\n\n", b""), error
            )

    def _request(self, scope: Message, body: Body) -> Any:
        assert self._session is not None
        headers = kept_headers(scope["headers"])
        names = {name for name, _ in scope["headers"]}
        has_body = bool(names & {b"content-length", b"transfer-encoding"})
        if not has_body:
            body.ended.set()
        query = scope["query_string"].decode("latin-1")
        target = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
        return self._session.request(
            scope["method"],
            URL(f"http://engine{target}", encoded=True),
            headers=[(n.decode("latin-1"), text(v)) for n, v in headers],
            data=body.parts() if has_body else None,
            allow_redirects=False,
        )

    async def _tell(
        self,
        path: str,
        send: Send,
        started: bool,
        event_fits: bool,
        error: BaseException,
        refusal: Refusal | None = None,
    ) -> None:
        """Say that the engine dropped the request, as far as the answer still allows."""
        refusal = refusal or self._lost()
        if not started:
            content = refusal.body(path)
            await send(
                {
                    "type": "http.response.start",
                    "status": refusal.status,
                    "headers": refusal.headers(content),
                }
            )
            await send({"type": "http.response.body", "body": content})
        elif event_fits:
            await send({"type": "http.response.body", "body": refusal.event(path)})
        else:
            # uvicorn closes the connection without the end that the client waits for.
            raise EngineGone(f"relay {path}: the engine's answer broke off: {error}") from error

    async def _sweep(self) -> None:
        """Let go of clients that take nothing."""
        while True:
            await asyncio.sleep(min(SWEEP_S, self._slow_client_s / 2))
            now = time.monotonic()
            for flight in list(self.flights):
                since = flight.sending_since_s
                if since and now - since > self._slow_client_s and flight.task:
                    if not flight.slow:
                        self.num_slow_clients += 1
                    flight.slow = True
                    flight.task.cancel()


async def end_quietly(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task and wait for its end."""
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
