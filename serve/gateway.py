"""The HTTP front: our own routes by FastAPI, everything else relayed to the engine."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from serve.admission import Admission
from serve.http_errors import Refusal
from serve.relay import Message, Receive, Relay, Send, announced_bytes, is_work
from serve.stages import Stage
from serve.supervisor import Supervisor

OWN_PATHS = frozenset(("/livez", "/readyz", "/v1/health/live", "/v1/health/ready"))


class Gateway:
    """ASGI application over a supervisor's engine."""

    def __init__(
        self, supervisor: Supervisor, relay: Relay, admission: Admission | None = None
    ) -> None:
        self._admission = admission
        self._supervisor, self._relay = supervisor, relay
        self._own = own_routes(supervisor)
        self.num_refused = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "not relayed"})
        elif scope["path"] in OWN_PATHS:
            await self._own(scope, receive, send)
        elif refusal := self.refusal(scope["method"], scope["path"], announced_bytes(scope)):
            self.num_refused += 1
            await refuse(refusal, scope["path"], send)
        else:
            await self._relay(scope, receive, send)

    def refusal(self, method: str, path: str, num_bytes: int) -> Refusal | None:
        """Why the engine does not get this request; None when it does."""
        supervisor = self._supervisor
        if supervisor.ready:
            if self._admission is None or not is_work(method, path):
                return None
            return self._admission.refusal(num_bytes, self._relay.flights)
        # Looking on is free while running streams end.
        if supervisor.stage is Stage.DRAINING and not is_work(method, path):
            return None
        return supervisor.refusal()


async def refuse(refusal: Refusal, path: str, send: Send) -> None:
    """Answer with a refusal. The body of the request is not read, so the connection closes."""
    body = refusal.body(path)
    headers = [*refusal.headers(body), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def own_routes(supervisor: Supervisor) -> FastAPI:
    """Liveness and readiness."""
    app = FastAPI(openapi_url=None)

    @app.get("/livez")
    @app.get("/v1/health/live")
    async def livez() -> dict[str, str]:
        """This process answers; the engine may not."""
        return {"status": "live"}

    @app.get("/readyz")
    @app.get("/v1/health/ready")
    async def readyz() -> Response:
        """Whether a request would reach the engine now; else 503 with the stage it is in."""
        if supervisor.ready:
            return JSONResponse(readiness(supervisor))
        refusal = supervisor.refusal()
        headers = {}
        if refusal.retry_after_s is not None:
            headers["Retry-After"] = str(refusal.retry_after_s)
        return JSONResponse(readiness(supervisor), status_code=503, headers=headers)

    return app


def readiness(supervisor: Supervisor) -> dict[str, Any]:
    """The body of /readyz."""
    progress = supervisor.progress
    return {
        "ready": supervisor.ready,
        "stage": supervisor.stage.value,
        "progress": progress
        and {"done": progress.done, "total": progress.total, "what": progress.what},
        "reason": supervisor.failure or (supervisor.ends[-1].reason if supervisor.ends else None),
        "lives": supervisor.num_lives,
    }
