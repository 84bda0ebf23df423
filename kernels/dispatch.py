"""Which kernel serves a batch, ours or vLLM's Marlin: measured tables, read.

`bench.kernels --dispatch-table FILE` writes them, one file a device; those that ship are in
`kernels/dispatch_tables`, and DSV4_DISPATCH_TABLE names one that is used instead of all of them.
A table is of one shape of the layer. Standard library only.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

ENV = "DSV4_DISPATCH_TABLE"
FOLDER = Path(__file__).resolve().parent / "dispatch_tables"
SCHEMA_VERSION = 1


class Kernel(Enum):
    """Both compute the same layer from the same weights."""

    OURS = "ours"
    MARLIN = "marlin"


@dataclass(frozen=True)
class Shape:
    """Sizes of an MoE layer on one rank."""

    hidden_size: int
    inter_size: int
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class Device:
    """What a table was measured on, or is wanted for. Capability: "12.0"."""

    name: str
    capability: str


@dataclass(frozen=True)
class Dispatch:
    """The kernel for each number of tokens.

    Attributes:
        segments: (most tokens, kernel), ascending; the last one's None has no end.
        measured_on: None where nothing was measured.
        source: the table's file, or why there is none.
    Raises:
        ValueError: no segment, tokens that do not ascend from 1, an end that is not the last.
    """

    segments: tuple[tuple[int | None, Kernel], ...]
    measured_on: Device | None
    source: str

    def __post_init__(self) -> None:
        ends = [end for end, _ in self.segments]
        finite = ends[:-1]
        if (
            not ends
            or ends[-1] is not None
            or any(not isinstance(end, int) or end < 1 for end in finite)
            or finite != sorted(set(finite))
        ):
            raise ValueError(
                f"max_tokens = {ends}; they must ascend from 1, and only the last may be null"
            )

    def kernel(self, num_tokens: int) -> Kernel:
        """The kernel for a batch: that of the first segment that reaches so far."""
        for end, kernel in self.segments:
            if end is None or num_tokens <= end:
                return kernel
        raise AssertionError("the last segment has no end")

    @property
    def kernels(self) -> set[Kernel]:
        """Those that serve some batch."""
        return {kernel for _, kernel in self.segments}

    def __str__(self) -> str:
        parts, begin = [], 1
        for end, kernel in self.segments:
            tokens = f"{begin} to {end}" if end else f"{begin} and more"
            parts.append(f"{kernel.value} for {tokens} tokens")
            begin = (end or 0) + 1
        return ", ".join(parts)


def only_ours(why: str) -> Dispatch:
    """Ours for every batch, where that was asked for and nothing was measured."""
    return Dispatch(((None, Kernel.OURS),), None, why)


def find_dispatch(shape: Shape, device: Device, paths: list[Path] | None = None) -> Dispatch | None:
    """The table of a shape that was measured nearest to a device.

    Of this very device, else of its compute capability, else of any; among equals the first file
    by name.

    Args:
        paths: files to look in; None takes the variable's, else all that ship.
    Returns:
        None where no file has a table of this shape.
    Raises:
        ValueError: a file is not a dispatch table; the variable's file does not exist, or has no
            table of this shape.
    """
    named = _named() if paths is None else None
    found = [table for key, table in _all_tables(paths) if key == shape]
    if not found and named:
        raise ValueError(f"{ENV} = {str(named)!r}; it has no table of {shape}")
    return min(found, key=lambda table: _distance(table, device), default=None)


def find_similar(shape: Shape, device: Device, paths: list[Path] | None = None) -> Dispatch | None:
    """The table of the layer most like one that nothing was measured for.

    With as many experts and as many of them taken, as those decide how many tokens an expert gets;
    then nearest in the size of its weights, then as `find_dispatch`.
    """

    def unlike(entry: tuple[Shape, Dispatch]) -> tuple[float, int]:
        key, table = entry
        sizes = key.hidden_size * key.inter_size / (shape.hidden_size * shape.inter_size)
        return abs(math.log(sizes)), _distance(table, device)

    routing = (shape.num_experts, shape.top_k)
    found = [(k, t) for k, t in _all_tables(paths) if (k.num_experts, k.top_k) == routing]
    if not found:
        return None
    key, table = min(found, key=unlike)
    return Dispatch(table.segments, table.measured_on, f"{table.source}, there for {key}")


def _all_tables(paths: list[Path] | None) -> list[tuple[Shape, Dispatch]]:
    if paths is None:
        named = _named()
        paths = [named] if named else sorted(FOLDER.glob("*.json"))
    return [entry for path in paths for entry in read_tables(path)]


def _distance(table: Dispatch, device: Device) -> int:
    if table.measured_on == device:
        return 0
    return 1 if table.measured_on.capability == device.capability else 2


def read_tables(path: Path) -> list[tuple[Shape, Dispatch]]:
    """All tables of a file.

    Raises:
        ValueError: it is not a dispatch table of this schema; the file is named.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version = {data['schema_version']}; {SCHEMA_VERSION} is needed"
            )
        device = Device(data["device"], data["capability"])
        return [_read_table(table, device, path.name) for table in data["tables"]]
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"dispatch table: {path}: {what}") from error


def _read_table(table: dict[str, Any], device: Device, source: str) -> tuple[Shape, Dispatch]:
    shape = Shape(**{name: table[name] for name in Shape.__dataclass_fields__})
    segments = tuple((row["max_tokens"], Kernel(row["kernel"])) for row in table["segments"])
    return shape, Dispatch(segments, device, source)


def _named() -> Path | None:
    """The only reader of the variable."""
    value = os.environ.get(ENV)
    if not value:
        return None
    path = Path(value)
    if not path.is_file():
        raise ValueError(f"{ENV} = {value!r}; there is no such file")
    return path
