"""The HTTP front: our own routes by FastAPI, everything else relayed to the engine."""

from __future__ import annotations

from collections.abc import Callable

from serve.admission import Admission
from serve.http_errors import Refusal
from serve.keys import Access, Keys
from serve.relay import (
    Flight,
    Message,
    Outcome,
    Receive,
    Relay,
    Send,
    announced_bytes,
    answer,
    is_work,
)
from serve.request_id import client_id, new_id
from serve.stages import Stage
from serve.supervisor import Supervisor

# Always answered: what watches a container has no key.
PROBES = frozenset(("/livez", "/readyz", "/v1/health/live", "/v1/health/ready"))
# The page itself holds no data: it asks for the document, with a key where one is needed.
OWN_PATHS = PROBES | {"/status", "/status.json", "/metrics"}


class Gateway:
    """ASGI application over a supervisor's engine.

    Args:
        own: the application of OWN_PATHS.
        keys: who may send requests; None is everybody.
        open_paths: those that need no key.
        on_end: called with each request but those of OWN_PATHS.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        relay: Relay,
        own: Callable,
        admission: Admission | None = None,
        keys: Keys | None = None,
        open_paths: frozenset[str] = OWN_PATHS,
        on_end: Callable[[Flight], None] = lambda flight: None,
    ) -> None:
        self._supervisor, self._relay, self._own = supervisor, relay, own
        self._admission, self._keys, self._on_end = admission, keys, on_end
        self._open = open_paths

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "not relayed"})
            return
        path, method = scope["path"], scope["method"]
        flight = Flight(path, is_work(method, path), method, client_id(scope["headers"]))
        flight.client_named = bool(flight.request_id)
        flight.request_id = flight.request_id or new_id()
        # A browser's preflight cannot show a key; vLLM itself asks none of it.
        is_open = path in self._open or method == "OPTIONS"
        refusal = None if is_open else self._check_key(scope, flight)
        if path in OWN_PATHS and not refusal:
            await self._own(scope, receive, send)
            return
        try:
            if refusal := refusal or self._refusal(flight, announced_bytes(scope)):
                flight.outcome = Outcome.REFUSED
                await answer(refusal, flight, receive, send)
            else:
                await self._relay(scope, receive, send, flight)
        finally:
            self._on_end(flight)

    def _check_key(self, scope: Message, flight: Flight) -> Refusal | None:
        if self._keys is None:
            return None
        flight.key = self._keys.find(scope["headers"])
        if flight.key is None:
            return Refusal(401, "no valid API key, as Authorization: Bearer or x-api-key")
        return None

    def _refusal(self, flight: Flight, num_bytes: int) -> Refusal | None:
        """Why the engine does not get this request; None when it does."""
        supervisor = self._supervisor
        if supervisor.ready:
            if self._admission is None or not flight.work:
                return None
            return self._admission.refusal(num_bytes, self._relay.flights, flight.key)
        # Looking on is free while running streams end.
        if supervisor.stage is Stage.DRAINING and not flight.work:
            return None
        return supervisor.refusal()


def open_paths(status: Access, metrics: Access) -> frozenset[str]:
    """The paths that need no key: of ours, and vLLM's probe, which has none there either.

    A router waits for /health before it serves, and shows no key.
    """
    paths = PROBES | {"/status", "/health"}
    if status is Access.OPEN:
        paths |= {"/status.json"}
    if metrics is Access.OPEN:
        paths |= {"/metrics"}
    return paths
