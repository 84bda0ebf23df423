"""Result files: assembled, checked against the published schema, written once, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

from bench.load import summary
from bench.load.config import Cell, LoadConfig, to_json
from bench.load.errors import LoadError
from bench.load.journal import Journal
from bench.report import write_result

SCHEMA_VERSION = 1
KIND = "load"
SCHEMA = Path(__file__).with_name("result.schema.json")


def assemble(config: LoadConfig, cells: list[Cell], journal: Journal) -> dict[str, Any]:
    """The result of the rounds that are done; cells without any are left out."""
    entries = []
    for number, cell in enumerate(cells):
        done = [r for r in journal.done if r.cell == number]
        if done:
            entries.append(summary.summarize(cell, done, config))
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "label": config.label,
        "config": to_json(config),
        "server": journal.header["server"],
        "provenance": journal.header["provenance"],
        "warm_up": journal.header["warm_up"],
        "cells": entries,
    }


def problems(result: dict[str, Any]) -> list[str]:
    """Every cell's problems, with its depth and streams."""
    return [
        f"depth {cell['depth']}, streams {cell['max_concurrency']}: {problem}"
        for cell in result["cells"]
        for problem in cell["problems"]
    ]


def write(path: Path, result: dict[str, Any], schema: Path = SCHEMA) -> None:
    """Check and write; the file appears whole or not at all.

    Raises:
        LoadError: the file exists, or cannot be written.
    """
    if path.exists():
        raise LoadError(f"{path}: exists; a result is written once")
    jsonschema.validate(result, json.loads(schema.read_text(encoding="utf-8")))
    try:
        write_result(path, result)
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}") from error


def read(
    path: Path, kind: str = KIND, schema: Path = SCHEMA, command: str = "bench run"
) -> dict[str, Any]:
    """Read a result of a kind and of this schema version.

    Raises:
        LoadError: no such file, not a result of `command`, or another schema version.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise LoadError(f"{path}: not JSON: {error}") from error
    if not isinstance(result, dict) or result.get("kind") != kind:
        raise LoadError(f"{path}: not a result of `{command}`")
    if result.get("schema_version") != SCHEMA_VERSION:
        raise LoadError(
            f"{path}: schema version {result.get('schema_version')}; "
            f"this program has {SCHEMA_VERSION}"
        )
    try:
        jsonschema.validate(result, json.loads(schema.read_text(encoding="utf-8")))
    except jsonschema.ValidationError as error:
        place = "/".join(str(part) for part in error.absolute_path)
        raise LoadError(f"{path}: {place}: {error.message[:200]}") from error
    return result
