"""Which kernel serves which batch size on this device: a measured table for the vLLM backend.

One file per device name; it holds a table per shape of the layer:

    {"schema_version": 1, "device": .., "capability": "9.0", "tables": [
      {"hidden_size": .., "inter_size": .., "num_experts": .., "top_k": ..,
       "segments": [{"max_tokens": 64, "kernel": "ours"}, {"max_tokens": null, "kernel": "marlin"}],
       "measured": [{"tokens": 1, "ratio": 1.8}, ..]}]}

A batch takes the first segment whose `max_tokens` is not below its tokens (null: no end).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.kernels.problem import Shape

SCHEMA_VERSION = 1
OURS, MARLIN = "ours", "marlin"


def choose(ratio: float) -> str:
    """The kernel for a measured ratio, Marlin's time over ours."""
    return OURS if ratio >= 1 else MARLIN


def segments(ratios: dict[int, float]) -> list[dict[str, Any]]:
    """Segments from ratios by tokens.

    Between two measured sizes that disagree, and beyond the largest, Marlin serves: it is what is
    there without us, and we have no number to take its place.
    """
    sizes = sorted(ratios)
    rows: list[dict[str, Any]] = []
    for i, tokens in enumerate(sizes):
        kernel = choose(ratios[tokens])
        after = choose(ratios[sizes[i + 1]]) if i + 1 < len(sizes) else MARLIN
        if after == kernel:
            continue
        end = tokens if kernel == OURS else sizes[i + 1] - 1
        rows.append({"max_tokens": end, "kernel": kernel})
    return [*rows, {"max_tokens": None, "kernel": MARLIN}]


def lookup(rows: list[dict[str, Any]], num_tokens: int) -> str:
    """The kernel that a table names for a batch."""
    return next(
        row["kernel"]
        for row in rows
        if row["max_tokens"] is None or num_tokens <= row["max_tokens"]
    )


def write_table(
    path: Path,
    device: str,
    capability: str,
    shape: Shape,
    ratios: dict[int, float],
    provenance: dict[str, Any],
) -> None:
    """Write the table of a shape; tables of other shapes in the file stay.

    Raises:
        ValueError: the file is of another device or another schema.
    """
    key = {
        "hidden_size": shape.hidden_size,
        "inter_size": shape.inter_size,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
    }
    head = {"schema_version": SCHEMA_VERSION, "device": device, "capability": capability}
    tables: list[dict[str, Any]] = []
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        tables = before.pop("tables")
        if before != head:
            raise ValueError(f"dispatch table: {path} is of {before}; this device is {head}")
    tables = [table for table in tables if any(table[name] != key[name] for name in key)]
    measured = [{"tokens": size, "ratio": round(ratios[size], 4)} for size in sorted(ratios)]
    new = {**key, "segments": segments(ratios), "measured": measured, "provenance": provenance}
    tables = sorted([*tables, new], key=lambda table: [table[name] for name in key])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**head, "tables": tables}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
