"""Error bodies of our own answers, in the shape that clients of the API expect."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus

ANTHROPIC_PREFIX = "/v1/messages"
TYPES = {
    401: ("AuthenticationError", "authentication_error"),
    404: ("NotFoundError", "not_found_error"),
    405: ("MethodNotAllowedError", "invalid_request_error"),
    408: ("RequestTimeoutError", "timeout_error"),
    413: ("RequestTooLargeError", "request_too_large"),
    422: ("BadRequestError", "invalid_request_error"),
    429: ("RateLimitError", "rate_limit_error"),
    431: ("RequestHeaderFieldsTooLargeError", "request_too_large"),
    502: ("BadGatewayError", "api_error"),
    503: ("ServiceUnavailableError", "overloaded_error"),
    504: ("GatewayTimeoutError", "timeout_error"),
}


@dataclass(frozen=True)
class Refusal:
    """An answer of ours, not the engine's. retry_after_s: None when a retry is pointless."""

    status: int
    message: str
    retry_after_s: int | None = None

    def body(self, path: str) -> bytes:
        """JSON: Anthropic's envelope for its API, else OpenAI's as vLLM fills it."""
        openai, anthropic = TYPES.get(self.status, (HTTPStatus(self.status).phrase, "api_error"))
        if path.startswith(ANTHROPIC_PREFIX):
            error = {"type": anthropic, "message": self.message}
            return json.dumps({"type": "error", "error": error}).encode()
        error = {
            "message": self.message,
            "type": openai,
            "param": None,
            "code": self.status,
        }
        return json.dumps({"error": error}).encode()

    def event(self, path: str) -> bytes:
        """The same as the last event of a stream that has begun."""
        name = b"event: error\n" if path.startswith(ANTHROPIC_PREFIX) else b""
        return name + b"data: " + self.body(path) + b"\n\n"

    def headers(self, body: bytes) -> list[tuple[bytes, bytes]]:
        """Headers of the answer with that body."""
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(self.retry_after_s).encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers
