"""Request ids: the client's where it gives a fit one, else ours.

The engine gets the client's alone. Without one it takes the id that the request's body may have, or
draws its own; with one in the head it would not. What it took stands at the start of its answer.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from serve.relay import REQUEST_ID

FIT = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def client_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The id that the client gave; "" where it gave no fit one."""
    for name, value in headers:
        if name == REQUEST_ID and FIT.fullmatch(value):
            return value.decode()
    return ""


def new_id() -> str:
    """One of ours, by which the log and the answer know a request."""
    return f"req-{secrets.token_hex(12)}"
