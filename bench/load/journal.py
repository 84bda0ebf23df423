"""Rounds on disk, a line each, so that a run that was cut short goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.load import rounds
from bench.load.errors import LoadError

SCHEMA_VERSION = 1


class Journal:
    """One file: a header, then rounds. Every line is on disk before the next round starts."""

    # Of one line; a journal of something else has others.
    encode = staticmethod(rounds.to_json)
    decode = staticmethod(rounds.from_json)

    def __init__(self, path: Path, header: dict[str, Any], done: list[Any]) -> None:
        self.path = path
        self.header = header
        self.done = done

    @classmethod
    def start(cls, path: Path, header: dict[str, Any]) -> Journal:
        """Make a new one.

        Raises:
            LoadError: the file exists or cannot be written.
        """
        header = {"schema_version": SCHEMA_VERSION} | header
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(header) + "\n")
        except FileExistsError:
            raise LoadError(f"{path}: exists; go on with --resume {path}, or remove it") from None
        except OSError as error:
            raise LoadError(f"{path}: {error.strerror}") from error
        return cls(path, header, [])

    @classmethod
    def load(cls, path: Path) -> Journal:
        """Read one. A last line that was cut off is dropped, on disk too.

        Raises:
            LoadError: no such file, no journal, or of another schema version.
        """
        try:
            whole, newline, _ = path.read_bytes().rpartition(b"\n")
            lines = [json.loads(line) for line in whole.splitlines()]
        except OSError as error:
            raise LoadError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise LoadError(f"{path}: not a journal: {error}") from error
        if not lines or "schema_version" not in lines[0]:
            raise LoadError(f"{path}: not a journal: no header")
        version = lines[0]["schema_version"]
        if version != SCHEMA_VERSION:
            raise LoadError(f"{path}: schema version {version}; this program has {SCHEMA_VERSION}")
        path.write_bytes(whole + newline)
        return cls(path, lines[0], [cls.decode(line) for line in lines[1:]])

    def add(self, done: Any) -> None:
        """Append a round."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.encode(done), separators=(",", ":")) + "\n")
        self.done.append(done)

    def has(self, cell: int, repeat: int) -> bool:
        """Whether that round is done."""
        return any(d.cell == cell and d.repeat == repeat for d in self.done)
