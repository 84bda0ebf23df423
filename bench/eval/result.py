"""Result files of scored runs and of parity: checked against their schemas, written once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.eval import summary
from bench.eval.config import EvalConfig, to_json
from bench.eval.engine import ItemJournal
from bench.eval.items import Verdict
from bench.eval.tasks import Task
from bench.load import result as load_result

SCHEMA_VERSION = 1
KIND = "eval"
SCHEMA = Path(__file__).with_name("result.schema.json")
PARITY_KIND = "parity"
PARITY_SCHEMA = Path(__file__).with_name("parity.schema.json")
COMMAND = "bench eval"


def assemble(config: EvalConfig, tasks: Sequence[Task], journal: ItemJournal) -> dict[str, Any]:
    """The result of the items that were asked."""
    records = journal.records()
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "label": config.label,
        "config": to_json(config),
        "server": journal.header["server"],
        "provenance": journal.header["provenance"],
        "sandbox": journal.header["sandbox"],
        "notes": journal.header["notes"],
        "tasks": [summary.summarize(task, records) for task in tasks],
    }


def problems(result: dict[str, Any]) -> list[str]:
    """Every task's problems, with its name."""
    return [f"{entry['task']}: {p}" for entry in result["tasks"] for p in entry["problems"]]


def num_failed(result: dict[str, Any]) -> int:
    """Items that the server gave no answer to; a resumed run asks them again."""
    return sum(entry["verdicts"][Verdict.FAILED.value] for entry in result["tasks"])


def write(path: Path, result: dict[str, Any]) -> None:
    """Check and write; see `bench.load.result.write`."""
    load_result.write(path, result, SCHEMA)


def read(path: Path) -> dict[str, Any]:
    """Read a scored result; see `bench.load.result.read`."""
    return load_result.read(path, KIND, SCHEMA, COMMAND)
