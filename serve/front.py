"""Supervisor and gateway in one process: what `serve run` is unless --gateway is off."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from serve.admission import Admission, AdmissionLimits
from serve.allreduce_tier import Tiers
from serve.errors import ConfigError
from serve.faults import Faults
from serve.gateway import Gateway, open_paths
from serve.keys import HEADERS, Access, Keys
from serve.log import Log, LogFormat, event
from serve.metrics import Metrics
from serve.monitor import Monitor
from serve.own_routes import OwnRoutes
from serve.profiles import Profile
from serve.protocol import bounded
from serve.relay import Flight, Outcome, Relay, end_quietly
from serve.status import Parts
from serve.supervisor import Limits, Supervisor
from serve.traffic import Traffic
from serve.versions import collect_versions
from serve.watchdog import WatchConfig, Watchdog

KEEP_ALIVE_S = 75
# Connections to a peer that is gone without a word are given up after so long.
TCP_DEAD_S = 60
DRAIN_POLL_S = 0.05
UNIX_PATH_BYTES = 107  # sun_path without its closing zero


@dataclass(frozen=True)
class FrontConfig:
    """shutdown_timeout: seconds that running requests may take after the first SIGTERM."""

    profile: Profile
    host: str
    port: int
    socket_path: Path
    watch: WatchConfig
    shutdown_timeout: float = 30.0
    slow_client_s: float = 60.0
    max_head_bytes: int = 65536
    monitor_interval_s: float = 5.0
    load_record: Path | None = None
    keys: Keys | None = None
    status_access: Access = Access.OPEN
    metrics_access: Access = Access.OPEN
    log_format: LogFormat = LogFormat.JSON
    limits: Limits = field(default_factory=Limits)
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)


class Server(uvicorn.Server):
    """uvicorn, its signals left to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int, slow_client_s: float = TCP_DEAD_S) -> socket.socket:
    """A listening TCP socket. slow_client_s: of a client in so long the kernel does not despair.

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
    dead_ms = round(1000 * max(TCP_DEAD_S, slow_client_s + 1))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, dead_ms)
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
    tiers: Tiers | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT: listen, start the engine, drain, end it.

    Returns:
        The exit status: 0 when every accepted request was answered, 1 when the grace or a second
        signal cut some off.
    """
    with Log(config.log_format):
        return await serve_logged(config, command, environment, sock, on_ready, tiers)


async def serve_logged(
    config: FrontConfig,
    command: list[str],
    environment: dict[str, str],
    sock: socket.socket,
    on_ready: Callable[[], None],
    tiers: Tiers | None,
) -> int:
    """`serve` while the log is open."""
    faults, traffic = Faults(), Traffic()
    signals = [asyncio.Event(), asyncio.Event()]
    supervisor = Supervisor(
        command,
        environment,
        config.socket_path,
        config.limits,
        on_ready,
        faults=faults,
        tiers=tiers,
    )
    admission = Admission(config.admission)
    relay = Relay(
        config.socket_path,
        config.slow_client_s,
        supervisor.lost,
        config.admission.max_body_bytes,
        HEADERS if config.keys else frozenset(),
    )
    watchdog = Watchdog(config.watch, supervisor, relay, faults)
    monitor = Monitor(
        supervisor,
        traffic,
        faults,
        config.load_record,
        config.profile.num_speculative_tokens,
        config.monitor_interval_s,
    )
    parts = Parts(
        config.profile,
        collect_versions(),
        supervisor,
        relay,
        admission,
        watchdog,
        traffic,
        faults,
        monitor,
        started_s=time.monotonic(),
        tier_of_cards=tiers.all_reduce if tiers else None,
    )
    metrics = Metrics(parts)
    own = OwnRoutes(parts, metrics)

    cut: set[Flight] = set()  # after the signal

    def on_end(flight: Flight) -> None:
        if flight.outcome is Outcome.ENGINE_LOST and signals[0].is_set():
            cut.add(flight)
        admission.learn(flight, time.monotonic())
        metrics.observe(flight, time.monotonic())
        traffic.ended(flight)

    gateway = Gateway(
        supervisor,
        relay,
        own.app,
        admission,
        config.keys,
        open_paths(config.status_access, config.metrics_access),
        on_end,
    )
    await relay.start()
    server = Server(
        uvicorn.Config(
            gateway,
            http=bounded(config.max_head_bytes, config.slow_client_s),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            server_header=False,
            date_header=False,
        )
    )

    def on_signal() -> None:
        next((event for event in signals if not event.is_set()), signals[-1]).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    http = asyncio.create_task(server.serve(sockets=[sock]))
    engine = asyncio.create_task(supervisor.run())
    watch = asyncio.create_task(watchdog.run())
    look = asyncio.create_task(monitor.run())
    told = asyncio.create_task(signals[0].wait())
    try:
        # Only the signal ends by itself; if another does, its error must end the command.
        await asyncio.wait((http, engine, told, watch), return_when=asyncio.FIRST_COMPLETED)
        supervisor.drain()
        if told.done():
            cut |= await drain(relay, signals[1], config.shutdown_timeout)
        supervisor.stop()
        await engine
    finally:
        server.should_exit = True
        await http
        await relay.close()
        await end_quietly(told)
        await end_quietly(watch)
        await end_quietly(look)
        await own.close()
        config.socket_path.unlink(missing_ok=True)
    if cut:
        event("drain", f"{len(cut)} request(s) cut off", logging.WARNING)
    return 1 if cut else 0


async def drain(relay: Relay, now: asyncio.Event, grace_s: float) -> set[Flight]:
    """Wait for the requests in flight; returns those that are left after the grace or a signal."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace_s
    accepted = set(relay.flights)  # more may come that only look on
    while accepted & relay.flights and not now.is_set() and loop.time() < deadline:
        await asyncio.sleep(DRAIN_POLL_S)
    return accepted & relay.flights
