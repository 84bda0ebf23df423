"""What the Grafana dashboard asks Prometheus for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "serve" / "monitoring"
DASHBOARD = FOLDER / "grafana-dashboard.json"
# What an expression holds beside names of metrics.
SELECTOR = re.compile(r"\{(?P<labels>[^}]*)\}|\[[^\]]*\]|\bby \((?P<by>[^)]*)\)")
NAME = re.compile(r"[A-Za-z_:][\w:]*")
LABEL = re.compile(r"(\w+)\s*[=!]~?")


def board() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def targets() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each query with its panel's title."""
    for panel in board()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target


def metric_names(expression: str) -> set[str]:
    """Names that are not called: PromQL's functions are."""
    bare = SELECTOR.sub(" ", expression)
    return {
        found[0]
        for found in NAME.finditer(bare)
        if not bare[found.end() :].lstrip().startswith("(") and not found[0].isdecimal()
    }


def labels(target: dict[str, Any]) -> set[str]:
    """Labels that a query selects by, sums by or shows, but Prometheus's own."""
    found = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    for match in SELECTOR.finditer(target["expr"]):
        found |= set(LABEL.findall(match["labels"] or ""))
        found |= {label.strip() for label in (match["by"] or "").split(",") if label.strip()}
    return found - {"instance", "job"}


def page_names(page: str) -> set[str]:
    """Names of samples, and of our families that have none yet, as those of GPUs."""
    samples = {match[0] for line in page.splitlines() if (match := NAME.match(line))}
    types = re.findall(r"^# TYPE (\S+) gauge$", page, re.MULTILINE)
    return samples | set(types)
