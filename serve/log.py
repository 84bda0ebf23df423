"""Our log: one line for each event, on stderr, as JSON or as text.

A line says who asked for what and how it ended: never a key, a header, a query, a prompt or an
output. Lines are written by a thread, so that a blocked terminal does not stop the gateway.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import threading
import time
from enum import StrEnum
from typing import Any

LOGGER = logging.getLogger("serve")
STDERR = 2
MAX_WAITING = 10_000  # lines; beyond that they are dropped, and the next one says how many
STOP_S = 2.0  # for lines that wait at the end
BARE = re.compile(r"[\w./:@+-]+")


class LogFormat(StrEnum):
    """json: one object for each line. text: for people."""

    JSON = "json"
    TEXT = "text"


def event(name: str, message: str = "", level: int = logging.INFO, **fields: Any) -> None:
    """Log an event. `fields` are JSON values; those that are None are left out."""
    LOGGER.log(level, message, extra={"event": name, "fields": fields})


class JsonFormatter(logging.Formatter):
    """A record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": stamp(record.created),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
        }
        if message := record.getMessage():
            line["message"] = message
        line |= {k: v for k, v in getattr(record, "fields", {}).items() if v is not None}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """A record as a line to read."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        shown = " ".join(f"{k}={quoted(v)}" for k, v in fields.items() if v is not None)
        parts = [f"serve: {record.getMessage() or getattr(record, 'event', '')}", shown]
        text = " ".join(part for part in parts if part).replace("\n", "\\n")
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def record_of(text: str) -> logging.LogRecord:
    """A warning of the log about itself."""
    return logging.makeLogRecord({"name": "log", "levelname": "WARNING", "msg": text})


def quoted(value: Any) -> str:
    """A value of which nobody can take a part for another field."""
    return json.dumps(value) if isinstance(value, str) and not BARE.fullmatch(value) else str(value)


def stamp(unix_s: float) -> str:
    """UTC with milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s))
    return f"{whole}.{int(unix_s % 1 * 1000):03}Z"


class Writer(logging.Handler):
    """Writes records in a thread of its own; drops them where that does not keep up."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.num_dropped = 0
        self._descriptor = descriptor
        self._waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self.num_dropped += 1

    def stop(self) -> None:
        """Write what waits, as far as somebody reads it."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=STOP_S)
            self._thread.join(STOP_S)

    def _run(self) -> None:
        num_told = 0
        while record := self._waiting.get():
            self._write(record)
            if (num_dropped := self.num_dropped) > num_told:
                text = f"{num_dropped - num_told} lines of this log were dropped: nobody read them"
                self._write(record_of(text))
                num_told = num_dropped

    def _write(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001 (another package's record ends no log of ours)
            line = self.format(record_of(f"a line of {record.name}: {type(error).__name__}"))
        rest = memoryview(line.encode(errors="backslashreplace") + b"\n")
        # Not by sys.stderr: its lock would be waited for at exit, where nobody reads.
        with contextlib.suppress(OSError):
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


class Log:
    """The log while a server runs; a context manager."""

    def __init__(self, log_format: LogFormat, descriptor: int = STDERR) -> None:
        self._writer = Writer(descriptor)
        json_lines = log_format is LogFormat.JSON
        self._writer.setFormatter(JsonFormatter() if json_lines else TextFormatter())

    def __enter__(self) -> Log:
        logging.getLogger().addHandler(self._writer)
        LOGGER.setLevel(logging.INFO)
        # Beside ours only what others warn of: uvicorn's and asyncio's faults.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._writer)
        self._writer.stop()
