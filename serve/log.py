"""Our log: one line for each event, on stderr, as JSON or as text.

A line says who asked for what and how it ended: never a key, a header, a query, a prompt or an
output. Lines are written by a thread, so that a blocked terminal does not stop the gateway.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
import time
from enum import StrEnum
from typing import Any, TextIO

LOGGER = logging.getLogger("serve")
MAX_WAITING = 10_000  # lines; beyond that they are dropped, and counted


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
        shown = " ".join(f"{k}={v}" for k, v in fields.items() if v is not None)
        parts = [f"serve: {record.getMessage() or getattr(record, 'event', '')}", shown]
        text = " ".join(part for part in parts if part)
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def stamp(unix_s: float) -> str:
    """UTC with milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s))
    return f"{whole}.{int(unix_s % 1 * 1000):03}Z"


class Queue(logging.handlers.QueueHandler):
    """Hands records to the writing thread; drops them where it does not keep up."""

    def __init__(self) -> None:
        super().__init__(queue.Queue(MAX_WAITING))
        self.num_dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # formatted in the thread

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.num_dropped += 1


class Log:
    """The log while a server runs; a context manager."""

    def __init__(self, log_format: LogFormat, output: TextIO | None = None) -> None:
        handler = logging.StreamHandler(output or sys.stderr)
        json_lines = log_format is LogFormat.JSON
        handler.setFormatter(JsonFormatter() if json_lines else TextFormatter())
        self._queue = Queue()
        self._listener = logging.handlers.QueueListener(self._queue.queue, handler)

    @property
    def num_dropped(self) -> int:
        """Lines that were not written."""
        return self._queue.num_dropped

    def __enter__(self) -> Log:
        root = logging.getLogger()
        root.addHandler(self._queue)
        LOGGER.setLevel(logging.INFO)
        # Beside ours only what others warn of: uvicorn's and asyncio's faults.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._queue)
        self._listener.stop()
