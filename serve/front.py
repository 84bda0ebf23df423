"""Supervisor and gateway in one process: what `serve run` is unless --gateway is off."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from serve.admission import Admission, AdmissionLimits
from serve.errors import ConfigError
from serve.gateway import Gateway
from serve.relay import Relay, end_quietly
from serve.supervisor import Limits, Supervisor
from serve.watchdog import WatchConfig, Watchdog

KEEP_ALIVE_S = 75
# Connections to a peer that is gone without a word are given up after so long.
TCP_DEAD_S = 60
DRAIN_POLL_S = 0.05
UNIX_PATH_BYTES = 107  # sun_path without its closing zero


@dataclass(frozen=True)
class FrontConfig:
    """shutdown_timeout: seconds that running requests may take after the first SIGTERM."""

    host: str
    port: int
    socket_path: Path
    watch: WatchConfig
    shutdown_timeout: float = 30.0
    slow_client_s: float = 60.0
    limits: Limits = field(default_factory=Limits)
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)


class Server(uvicorn.Server):
    """uvicorn, its signals left to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        ConfigError: nothing can listen there.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}") from error
    # Accepted connections inherit these. Without the first, each answer on a kept connection waits
    # 40 ms for an acknowledgement: asyncio sets it only on sockets made with IPPROTO_TCP.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, TCP_DEAD_S // 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_DEAD_S * 1000)
    return sock


def check_socket_path(path: Path) -> None:
    """Refuse a path that the kernel would not take for a socket.

    Raises:
        ConfigError: it is too long.
    """
    if len(str(path).encode()) > UNIX_PATH_BYTES:
        raise ConfigError(
            f"engine socket {path}: {len(str(path).encode())} bytes; at most {UNIX_PATH_BYTES}. "
            "Set TMPDIR to a shorter folder"
        )


def run(serving: Coroutine[Any, Any, int]) -> int:
    """Run `serve` to its end, on uvloop: a chunk's way is a third shorter on it."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serving)


async def serve(
    config: FrontConfig,
    command: list[str],
    environment: dict[str, str],
    sock: socket.socket,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Serve until SIGTERM or SIGINT: listen, start the engine, drain, end it.

    Returns:
        The exit status: 0 when every accepted request was answered, 1 when the grace or a second
        signal cut some off.
    """
    supervisor = Supervisor(command, environment, config.socket_path, config.limits, on_ready)
    admission = Admission(config.admission)
    relay = Relay(
        config.socket_path,
        config.slow_client_s,
        supervisor.lost,
        config.admission.max_body_bytes,
        lambda flight: admission.learn(flight, time.monotonic()),
    )
    await relay.start()
    gateway = Gateway(supervisor, relay, admission)
    server = Server(
        uvicorn.Config(
            gateway,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            server_header=False,
            date_header=False,
        )
    )
    signals = [asyncio.Event(), asyncio.Event()]

    def on_signal() -> None:
        next((event for event in signals if not event.is_set()), signals[-1]).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    http = asyncio.create_task(server.serve(sockets=[sock]))
    engine = asyncio.create_task(supervisor.run())
    watch = asyncio.create_task(Watchdog(config.watch, supervisor, relay).run())
    told = asyncio.create_task(signals[0].wait())
    try:
        # Only the signal ends by itself; if another does, its error must end the command.
        await asyncio.wait((http, engine, told, watch), return_when=asyncio.FIRST_COMPLETED)
        supervisor.drain()
        num_cut = await drain(relay, signals[1], config.shutdown_timeout) if told.done() else 0
        supervisor.stop()
        await engine
    finally:
        server.should_exit = True
        await http
        await relay.close()
        await end_quietly(told)
        await end_quietly(watch)
        config.socket_path.unlink(missing_ok=True)
    if num_cut:
        print(f"serve: {num_cut} request(s) cut off", file=sys.stderr, flush=True)
    return 1 if num_cut else 0


async def drain(relay: Relay, now: asyncio.Event, grace_s: float) -> int:
    """Wait for the requests in flight; returns how many are left after the grace or a signal."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace_s
    while relay.num_working and not now.is_set() and loop.time() < deadline:
        await asyncio.sleep(DRAIN_POLL_S)
    return relay.num_working
