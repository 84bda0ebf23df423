"""How `capture` and the plugin in the server talk: two small files in the calibration folder.

    control.json   the client's order:  request, action, budget_bytes, meta
    status.json    the plugin's answer: request, error, num_rows, full

Each order has a new `request`; the plugin answers with the same one. Rows are in the folder's
meta.json, together with the prompts that they came from, once `commit` is answered.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

CONTROL = "control.json"
STATUS = "status.json"
# The plugin's variable: the folder that it writes to. Read in kernels/capture.py only.
CAPTURE_DIR = "DSV4_CAPTURE_DIR"


class Action(StrEnum):
    """begin: continue from meta.json and record; commit: write the rows so far, then meta.json;
    stop: record no more, and drop what was not committed."""

    BEGIN = "begin"
    COMMIT = "commit"
    STOP = "stop"


@dataclass(frozen=True)
class Order:
    """What the client wants. meta goes into meta.json with the rows."""

    request: str
    action: Action
    budget_bytes: int
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What the plugin did. num_rows: on disk; full: the budget is reached."""

    request: str
    error: str | None
    num_rows: int
    full: bool


def write(path: Path, message: Order | Answer) -> None:
    """Write beside, then rename."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(asdict(message)) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_order(folder: Path) -> Order | None:
    """The client's order; None where there is none.

    Raises:
        ValueError: the file is not as the module says.
    """
    value = _read(folder / CONTROL)
    if value is None:
        return None
    return Order(
        str(value["request"]), Action(value["action"]), int(value["budget_bytes"]), value["meta"]
    )


def read_answer(folder: Path) -> Answer | None:
    """The plugin's answer; None where there is none.

    Raises:
        ValueError: the file is not as the module says.
    """
    value = _read(folder / STATUS)
    return None if value is None else Answer(**value)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
