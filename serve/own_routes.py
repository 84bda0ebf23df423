"""Our own routes: liveness, readiness, the status page and its document, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import aiohttp
from fastapi import FastAPI, Query, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from serve.http_errors import Refusal
from serve.metrics import CONTENT_TYPE, Metrics
from serve.status import Parts, Status, build_status
from serve.supervisor import Supervisor

PAGE = Path(__file__).parent / "page" / "status.html"
# Nothing but the page itself may run or be loaded, whatever the document says.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "not ready"}}


class OwnRoutes:
    """The application; `close` ends its session with the engine."""

    def __init__(self, parts: Parts, metrics: Metrics) -> None:
        self._parts, self._metrics = parts, metrics
        self._session: aiohttp.ClientSession | None = None
        self.app = FastAPI(title="serve", openapi_url=None)
        self._add_probes(parts.supervisor)
        self._add_status()
        for kind in (HTTPException, RequestValidationError):
            self.app.add_exception_handler(kind, in_our_words)

    async def close(self) -> None:
        """Close what is open."""
        if self._session:
            await self._session.close()

    def _add_probes(self, supervisor: Supervisor) -> None:
        @self.app.api_route("/livez", methods=["GET", "HEAD"])
        @self.app.api_route("/v1/health/live", methods=["GET", "HEAD"])
        async def livez() -> dict[str, str]:
            """This process answers; the engine may not."""
            return {"status": "live"}

        @self.app.api_route("/readyz", methods=["GET", "HEAD"], responses=NOT_READY)
        @self.app.api_route("/v1/health/ready", methods=["GET", "HEAD"], responses=NOT_READY)
        async def readyz() -> Response:
            """Whether a request would reach the engine now; else 503 with the stage it is in."""
            if supervisor.ready:
                return JSONResponse(readiness(supervisor))
            refusal = supervisor.refusal()
            headers = {}
            if refusal.retry_after_s is not None:
                headers["Retry-After"] = str(refusal.retry_after_s)
            return JSONResponse(readiness(supervisor), status_code=503, headers=headers)

    def _add_status(self) -> None:
        page = PAGE.read_text(encoding="utf-8")

        @self.app.get("/status.json", responses={422: {"description": "not a number"}})
        async def status_json(
            since: Annotated[float, Query(allow_inf_nan=False)] = 0.0,
        ) -> Status:
            """Everything in one document; of the history what is newer than `since`, Unix time."""
            return build_status(self._parts, since)

        @self.app.get("/status", response_class=HTMLResponse)
        async def status() -> HTMLResponse:
            """The page that shows it."""
            return HTMLResponse(page, headers=PAGE_HEADERS)

        @self.app.get("/metrics")
        async def metrics() -> Response:
            """Our metrics, then vLLM's where it answers."""
            monitor = self._parts.monitor
            if self._session is None:
                self._session = monitor.session()
            page = self._metrics.page(await monitor.page(self._session))
            return Response(page, headers={"Content-Type": CONTENT_TYPE})


async def in_our_words(request: Request, error: Exception) -> Response:
    """FastAPI's refusals in the shape of all our errors."""
    status, text = 422, "the query"
    if isinstance(error, HTTPException):
        status, text = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    body = Refusal(status, text).body(request.url.path)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else None
    return Response(body, status, headers, "application/json")


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
