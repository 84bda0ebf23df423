"""One HTTP/1.1 request to the engine's unix socket, and its answer as it comes.

The parser is httptools', which uvicorn uses at the other end. A general client does more for each
chunk than a relay needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httptools

CONNECT_S = 10.0
READ_AHEAD_BYTES = 2**18  # of an answer that its client has not taken; then the engine waits
MAX_HEAD_BYTES = 2**18
Headers = list[tuple[bytes, bytes]]


class EngineGone(Exception):
    """The engine closed its connection, or said what is not HTTP, before the answer's end."""


class Upstream(asyncio.Protocol):
    """A connection for one request. A connection kept for the next one could be closed by the
    engine just when a POST, which must not be sent twice, is written to it; a new one is cheap.
    """

    def __init__(self, method: str) -> None:
        self.status = 0
        self.headers: Headers = []
        self.has_body = method != "HEAD"
        self._until_close = False
        self._head_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []
        self._num_bytes = 0  # in _parts
        self._paused = False
        self._head = self._whole = False
        self._error: Exception | None = None
        self._sink: Callable[[bytes], bool] | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    @classmethod
    async def open(cls, path: Path, method: str) -> Upstream:
        """Connect.

        Raises:
            OSError: nothing listens there.
            TimeoutError: nothing accepts.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_S):
            _, upstream = await loop.create_unix_connection(lambda: cls(method), str(path))
        return upstream

    def send_head(self, method: str, target: bytes, headers: Headers) -> None:
        """Send the request's head. Names and values are a parsed request's, free of line ends."""
        lines = [method.encode() + b" " + target + b" HTTP/1.1\r\n"]
        lines += [b"%b: %b\r\n" % header for header in headers]
        lines.append(b"\r\n")
        self._write(b"".join(lines))

    async def send(self, data: bytes) -> None:
        """Send bytes of the body; waits while the engine takes none.

        Raises:
            EngineGone: it does not listen any more.
        """
        self._write(data)
        await self._writable.wait()

    async def head(self) -> None:
        """Wait for the answer's head.

        Raises:
            EngineGone: there will be none.
        """
        while not self._head:
            await self._wait()

    async def read(self) -> bytes:
        """The next bytes of the answer's body, all that have come; empty at its end.

        Raises:
            EngineGone: it broke off. What came before is returned first.
        """
        while not self._parts:
            if self._whole:
                return b""
            await self._wait()
        self._resume()
        return self._take()

    async def pass_to(self, sink: Callable[[bytes], bool]) -> bool:
        """Give the body's bytes to `sink` as they come, in the very call that brings them.

        Returns:
            whether the body has ended; not when `sink` returned False, which wants no more for now.
        Raises:
            EngineGone: it broke off. What came before was given first.
        """
        if self._parts and not sink(self._take()):
            return False
        self._sink = sink
        self._resume()
        try:
            while self._sink and not self._whole:
                await self._wait()
            return self._sink is not None
        finally:
            self._sink = None

    def abort(self, error: Exception | None = None) -> None:
        """Close the connection now; who waits for the answer gets `error`."""
        if not self._whole:
            self._error = self._error or error or EngineGone("the connection was closed")
        if self._transport:
            self._transport.abort()
        self._wake()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if not self._head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.abort(EngineGone(f"the engine's answer is not HTTP: {error}"))
            return
        if self._sink and self._parts:
            if self._sink(self._take()):
                if not self._whole:
                    return
            else:
                self._sink = None
                self._pause()
        elif not self._head and self._head_bytes > MAX_HEAD_BYTES:
            self.abort(
                EngineGone(f"the head of the engine's answer exceeds {MAX_HEAD_BYTES} bytes")
            )
        elif self._num_bytes > READ_AHEAD_BYTES:
            self._pause()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._until_close and exc is None:
            self._whole = True
        if not self._whole and self._error is None:
            self._error = EngineGone(f"the engine closed the connection: {exc or 'no error'}")
        self._writable.set()
        self._wake()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head:  # trailers are not relayed
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:  # 100 Continue, 103 Early Hints: the answer follows
            self.headers = []
            return
        names = {name for name, _ in self.headers}
        self.has_body = self.has_body and self.status not in (204, 304)
        framed = names & {b"content-length", b"transfer-encoding"}
        self._until_close = self.has_body and not framed
        self._head, self._whole = True, not self.has_body

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._num_bytes += len(body)

    def on_message_complete(self) -> None:
        if self._head:
            self._whole = True

    def _write(self, data: bytes) -> None:
        if self._error or self._transport is None or self._transport.is_closing():
            # Who waits for the answer gets the error that `abort` was given.
            raise EngineGone("the connection was closed") from self._error
        self._transport.write(data)

    def _take(self) -> bytes:
        part = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._num_bytes = 0
        return part

    def _pause(self) -> None:
        if not self._paused and self._transport:
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and self._transport and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    async def _wait(self) -> None:
        if self._error:
            raise self._error
        self._reader = self._loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _wake(self) -> None:
        if self._reader and not self._reader.done():
            self._reader.set_result(None)
