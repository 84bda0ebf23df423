"""API keys: read from a file, compared in constant time, each with a name and a limit."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from serve.errors import ConfigError

MIN_KEY_CHARS = 16
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What carries a key; the engine does not get these.
HEADERS = frozenset((b"authorization", b"x-api-key"))


class Access(StrEnum):
    """Who may read a page of ours."""

    KEY = "key"  # whoever may send requests: all, where there is no key file
    OPEN = "open"


@dataclass(frozen=True)
class Key:
    """Who a key belongs to. max_concurrency: requests in work at a time; None is no limit."""

    name: str
    max_concurrency: int | None = None


class Keys:
    """The keys of a file; only their hashes are kept."""

    def __init__(self, entries: Iterable[tuple[Key, str]]) -> None:
        self._entries = [(key, digest(secret.encode())) for key, secret in entries]

    @property
    def names(self) -> list[str]:
        return [key.name for key, _ in self._entries]

    def find(self, headers: Iterable[tuple[bytes, bytes]]) -> Key | None:
        """The key that a request's headers show, as `Authorization: Bearer` or `x-api-key`."""
        found = None
        for name, value in headers:
            shown = presented(name, value)
            if shown is None:
                continue
            given = digest(shown)
            for key, wanted in self._entries:  # all of them: time tells nothing
                if hmac.compare_digest(given, wanted):
                    found = key
        return found


def digest(secret: bytes) -> bytes:
    """A key's hash: of one length, so that comparing tells nothing of the key's."""
    return hashlib.sha256(secret).digest()


def presented(name: bytes, value: bytes) -> bytes | None:
    """The secret in a header, None where it holds none."""
    if name == b"x-api-key":
        return value.strip()
    if name == b"authorization":
        scheme, _, secret = value.strip().partition(b" ")
        if scheme.lower() == b"bearer":
            return secret.strip()
    return None


def read_keys(path: Path) -> Keys:
    """Read lines of `NAME KEY [MAX_CONCURRENCY]`; `#` begins a comment.

    Raises:
        ConfigError: it cannot be read, holds no key, or a line is wrong. Keys are never shown.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"api_key_file {path}: {reason}") from None
    entries: list[tuple[Key, str]] = []
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        where = f"api_key_file {path}: line {number}"
        if len(fields) not in (2, 3):
            raise ConfigError(f"{where}: {len(fields)} fields; must be NAME KEY [MAX_CONCURRENCY]")
        name, secret, *limit = fields
        if not NAME.fullmatch(name):
            raise ConfigError(f"{where}: the name must match {NAME.pattern}")
        if len(secret) < MIN_KEY_CHARS or not secret.isascii():
            raise ConfigError(f"{where}: the key must be {MIN_KEY_CHARS} ASCII characters or more")
        if limit and not (limit[0].isdecimal() and int(limit[0])):
            raise ConfigError(f"{where}: MAX_CONCURRENCY = {limit[0]!r}; must be at least 1")
        if any(name == key.name or secret == other for key, other in entries):
            raise ConfigError(f"{where}: the name or the key is given twice")
        entries.append((Key(name, int(limit[0]) if limit else None), secret))
    if not entries:
        raise ConfigError(f"api_key_file {path}: holds no key")
    return Keys(entries)
