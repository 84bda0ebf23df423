"""Request ids: the client's where it gives a fit one, else ours."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from serve.relay import REQUEST_ID

FIT = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The id by which the log, the engine and the answer know a request."""
    for name, value in headers:
        if name == REQUEST_ID and FIT.fullmatch(value):
            return value.decode()
    return f"req-{secrets.token_hex(12)}"
