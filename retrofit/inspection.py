"""`inspect`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kernels.weights import Layout
from retrofit.errors import BadInput
from retrofit.layout import check_sizes, compare_head, head_entries, layer_of_head
from retrofit.reading import Checkpoint, Entry, absent_faults, scan


@dataclass(frozen=True)
class InspectConfig:
    """Options of `inspect`."""

    path: Path


@dataclass(frozen=True)
class Group:
    """Tensors of one kind and dtype."""

    name: str
    dtype: str
    count: int
    num_bytes: int


@dataclass(frozen=True)
class Head:
    """What the MTP head is: a layout's name, `absent` or `broken`, with every reason."""

    state: str
    nearest: Layout | None = None
    reasons: list[str] = field(default_factory=list)


def group_name(name: str) -> str:
    """`layers.3.ffn.experts.17.w1.weight` -> `layers ffn.experts.w1.weight`."""
    found = re.match(r"((?:model\.)?(?:layers|mtp))\.\d+\.(.*)", name)
    if not found:
        return f"top {name}"
    return f"{found[1]} " + re.sub(r"\.\d+\.", ".", found[2])


def groups(entries: Mapping[str, Entry]) -> list[Group]:
    """Tensors by group, in order of name."""
    counts: dict[tuple[str, str], list[int]] = {}
    for name, entry in entries.items():
        count = counts.setdefault((group_name(name), entry.dtype), [0, 0])
        count[0] += 1
        count[1] += entry.num_bytes
    return [Group(*key, *value) for key, value in sorted(counts.items())]


def head_of(checkpoint: Checkpoint) -> Head:
    """Which layout the head has; where it has none exactly, how it differs from the nearest."""
    try:
        check_sizes(checkpoint.config)
    except BadInput as error:
        found = head_entries(checkpoint.entries)
        return Head("broken" if found else "absent", None, [str(error)])
    config, entries = checkpoint.config, checkpoint.entries
    pattern = rf"(?:model\.)?layers\.{layer_of_head(config)}\."
    if not head_entries(entries) and not any(re.match(pattern, name) for name in entries):
        return Head("absent")
    reasons = {layout: compare_head(config, entries, layout) for layout in Layout}
    nearest = min(Layout, key=lambda layout: len(reasons[layout]))
    if not reasons[nearest]:
        return Head(nearest.value, nearest)
    return Head("broken", nearest, reasons[nearest])


def lines(checkpoint: Checkpoint) -> list[str]:
    """The report."""
    result = [f"{'group':<44} {'dtype':<8} {'tensors':>8} {'MB':>12}"]
    for group in groups(checkpoint.entries):
        result.append(
            f"{group.name:<44} {group.dtype:<8} {group.count:>8,} {group.num_bytes / 1e6:>12,.3f}"
        )
    total = sum(entry.num_bytes for entry in checkpoint.entries.values())
    result.append(
        f"{len(checkpoint.entries):,} tensors, {total / 1e9:,.3f} GB in "
        f"{len(checkpoint.shards())} files"
    )
    result += [f"fault: {fault}" for fault in checkpoint.faults + absent_faults(checkpoint)]
    head = head_of(checkpoint)
    near = f" (nearest: {head.nearest.value})" if head.state == "broken" and head.nearest else ""
    result.append(f"MTP head: {head.state}{near}")
    return result + [f"  {reason}" for reason in head.reasons]


def run(config: InspectConfig) -> int:
    """Print the report; 1 when files are damaged or the head is broken."""
    checkpoint = scan(config.path)
    print("\n".join(lines(checkpoint)))
    damaged = checkpoint.faults or checkpoint.absent_shards
    return 1 if damaged or head_of(checkpoint).state == "broken" else 0
