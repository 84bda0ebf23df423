"""uvicorn's HTTP/1.1 protocol with what it lacks: a bound on a request's head, in bytes and time,
and word that the client is gone where it has sent its next request already.

It also gives the application the connection, as `scope["state"]["connection"]`: to write a part of
an answer where it comes, without a task's turn, to end an answer that broke off, and to drop a
client that takes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import struct
import termios
from typing import Any

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from serve.http_errors import Refusal


class Protocol(HttpToolsProtocol):
    """One connection. The bounds are set by `bounded`."""

    max_head_bytes = 65536
    head_s = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = self._refused = False
        self._num_head_bytes = 0  # parsed of a head
        self._num_raw_bytes = 0  # received since a head, a part of a body or a request was whole
        self._timer: asyncio.TimerHandle | None = None
        self._first: RequestResponseCycle | None = None  # of those under way: whose turn it is

    # For the application.

    def write_chunk(self, body: bytes) -> bool:
        """Write bytes of an answer that has no length; whether the client keeps up with them."""
        if not self.transport.is_closing():
            self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return not self.flow.write_paused

    def num_bytes_left(self) -> int:
        """Bytes written that the client's machine has not taken: those here and the kernel's."""
        left = bytes(4)
        with contextlib.suppress(OSError, ValueError):  # closed
            left = fcntl.ioctl(self.transport.get_extra_info("socket"), termios.TIOCOUTQ, left)
        return self.transport.get_write_buffer_size() + struct.unpack("i", left)[0]

    def close(self) -> None:
        """Close when what was written has gone."""
        self.transport.close()

    def abort(self) -> None:
        """Close now."""
        self.transport.abort()

    # Of asyncio and httptools.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        if self._first and not self._first.response_complete:  # uvicorn tells the newest alone
            self._first.disconnected = True
            self._first.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._num_raw_bytes += len(data)
        super().data_received(data)
        if self._refused:
            return
        if self._num_raw_bytes > self.max_head_bytes:
            if self._in_head:  # a header without an end is never parsed
                self._refuse_head()
            else:  # trailers, extensions of a chunk, ends of lines: no answer belongs to them
                self._refused = True
                self.transport.abort()
        elif self._in_head:
            return
        elif self in self.connections and not (
            self._answering or self.timeout_keep_alive_task or self._timer
        ):
            # Line ends between requests, or the rest of a body that nobody wants, are no request:
            # they end uvicorn's wait for the next one, and without ours it would have no end.
            self._start_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["connection"] = self
        self._in_head, self._num_head_bytes = True, 0
        self._start_timer()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # httptools reports trailers here, too
            super().on_header(name, value)
            self._count(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._in_head, self._num_raw_bytes = False, 0
        self._stop_timer()
        if not self._refused:
            super().on_headers_complete()
            if len(self.pipeline) == 1:
                # uvicorn stops to read until it is this one's turn, and then nothing says that the
                # client is gone. A second one that waits, or a longer body, does stop it.
                self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        self._num_raw_bytes = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_raw_bytes = 0
        if not self._refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if not self._refused:  # a head can be both too long and wrong
            self._refused = True
            self._stop_timer()
            super().send_400_response(msg)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._first = cycle
        super()._start_asgi_task(cycle, app)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _count(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if not self._refused and self._num_head_bytes > self.max_head_bytes:
            self._refuse_head()

    def _refuse_head(self) -> None:
        self._refuse(Refusal(431, f"the request's head has more than {self.max_head_bytes} bytes"))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer before the application has seen the request, and close."""
        self._refused = True
        self._stop_timer()
        if self._answering:  # an earlier request of this connection: its answer must not be mixed
            self.transport.abort()
            return
        body = refusal.body("")
        headers = [*refusal.headers(body), (b"connection", b"close")]
        lines = [STATUS_LINE[refusal.status], *(b"%b: %b\r\n" % header for header in headers)]
        self.transport.write(b"".join([*lines, b"\r\n", body]))
        self.transport.close()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.head_s, self._on_timer)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        if self._answering:  # the head of a pipelined request waits for its turn
            self._start_timer()
        elif self._in_head:
            self._refuse(Refusal(408, f"the request's head took more than {self.head_s:g} s"))
        else:
            self.transport.close()


def bounded(max_head_bytes: int, head_s: float) -> type[Protocol]:
    """The protocol with these bounds: of a head's bytes, and of the time until it has come."""
    return type(
        "BoundedProtocol", (Protocol,), {"max_head_bytes": max_head_bytes, "head_s": head_s}
    )
