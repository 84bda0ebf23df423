"""What must not leave the machine, taken out of text and JSON."""

from __future__ import annotations

import os
import pwd
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# They stand in half of all paths and lines and say nothing of their owner. dsv4: the image's user.
COMMON = frozenset(("root", "localhost", "user", "app", "vllm", "serve", "ubuntu", "dsv4"))
MIN_WORD_CHARS = 3
SECRET_NAME = r"[\w-]*(?:api[-_]?key|secret|password|(?:hf|hub|access|auth)[-_]?token)"
SECRET_FIELD = re.compile(SECRET_NAME, re.IGNORECASE)
RULES = (
    (re.compile(r"(?i)\b(bearer|authorization\W+basic)\s+[^\s\"',;]+"), r"\1 [key]"),
    # By the looks of the issuers that people have, by a name before it, by a flag.
    (re.compile(r"\b(sk|hf|ghp|github_pat|xox[a-z])[-_][A-Za-z0-9_-]{16,}"), "[key]"),
    (
        re.compile(
            rf"(?i)({SECRET_NAME})(\\?[\"']?\s*[:=]\s*\\?[\"']?)(?!None\b|null\b)"
            r"(?:\[[^\]]*\]|[^\s\"',;}\\\[]+)"
        ),
        r"\1\2[key]",
    ),
    (re.compile(r"(--[\w-]*api-key\s+)\S+"), r"\1[key]"),
    (re.compile(r"(\w+://)[^/\s@\"']+@"), r"\1[key]@"),
    # vLLM writes these when it is told to log requests, and pydantic what it did not like. Each is
    # one line to its end.
    (
        re.compile(
            r"(?i)(\b(?:prompt|prompt_token_ids|messages|content|output|output_token_ids|text"
            r"|input_value|input)\\?[\"']?\s*[:=]\s*)(?=\\?[\"'\[{(]).*"
        ),
        r"\1[cut]",
    ),
    (re.compile(r"\bGPU-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "GPU-[uuid]"),
    (re.compile(r"/home/[^/\s\"',:;\\]+"), "~"),
    # Addresses of hosts and clients; loopback and the wildcard are no one's.
    (
        re.compile(
            r"(?<![\d.])(?!127\.|0\.0\.0\.0)(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}"
            r"(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])"
        ),
        "[address]",
    ),
)


class Redactor:
    """Takes known secrets, this host's and user's names and RULES out.

    Args:
        secrets: keys, wherever they stand, however short.
        home, user, host: of this process by default.
    """

    def __init__(
        self,
        secrets: Iterable[str] = (),
        home: Path | None = None,
        user: str | None = None,
        host: str | None = None,
    ) -> None:
        longest_first = sorted(set(filter(None, secrets)), key=len, reverse=True)
        self._literal = [(secret, "[key]") for secret in longest_first]
        home = home or Path("~").expanduser()
        if home not in (Path("/"), Path("/root")):
            self._literal.append((str(home), "~"))
        host = socket.gethostname() if host is None else host
        words = {host: "[host]", host.partition(".")[0]: "[host]"}
        words[user_name() if user is None else user] = "[user]"
        self._words = [
            (re.compile(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])"), shown)
            for word, shown in words.items()
            if len(word) >= MIN_WORD_CHARS and word.lower() not in COMMON
        ]
        self._names: dict[str, str] = {}

    def name(self, name: str) -> str:
        """A number for the name of an API key: the same one for the same name."""
        return self._names.setdefault(name, f"key-{len(self._names) + 1}")

    def text(self, text: str) -> str:
        """Lines without what must not leave."""
        text = self._without_literals(text)
        for pattern, shown in RULES:
            text = pattern.sub(shown, text)
        for pattern, shown in self._words:
            text = pattern.sub(shown, text)
        return text

    def json(self, value: Any) -> Any:
        """The same for each string of a JSON value. Of names of fields only secrets are changed."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.json(item) for item in value]
        if isinstance(value, dict):
            return {
                self._without_literals(name): "[key]"
                if isinstance(item, (str, list)) and item and SECRET_FIELD.fullmatch(name)
                else self.json(item)
                for name, item in value.items()
            }
        return value

    def _without_literals(self, text: str) -> str:
        for literal, shown in self._literal:
            text = text.replace(literal, shown)
        return text


def user_name() -> str:
    """The user's name; empty where the system has none for this id."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""
