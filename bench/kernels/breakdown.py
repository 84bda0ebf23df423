"""Where a layer's time goes, launch by launch, from a profile of graph replays.

Launches overlap: with programmatic dependent launch the next kernel starts while the last one still
runs. So besides its own duration each launch gets the time by which it makes the layer longer, from
the end of what came before it to its own end; these add up to the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.kernels.figures import median

REPLAYS = 8


@dataclass(frozen=True)
class Launch:
    """One launch of a layer, medians over steps and replays, microseconds."""

    kernel: str
    duration_us: float
    added_us: float


@dataclass(frozen=True)
class Span:
    """A kernel on the device's time line, microseconds."""

    name: str
    start: float
    end: float


def profile(gpu: Any, run: Callable[[], None], num_steps: int) -> list[Launch]:
    """Profile replays of a graph of `num_steps` layers.

    Raises:
        RuntimeError: the profiler saw no kernels, or not the same ones at each step.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    graph = gpu.capture(run)
    gpu.replay(graph)
    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            gpu.replay(graph)
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return launches(spans, num_steps, REPLAYS)


def launches(spans: Sequence[Span], num_steps: int, replays: int) -> list[Launch]:
    """Sort the kernels of all replays into the launches of one step.

    Raises:
        RuntimeError: there is not the same row of kernels at every step.
    """
    ordered = sorted(spans, key=lambda span: (span.start, span.end))
    steps = num_steps * replays
    count, rest = divmod(len(ordered), steps)
    if not count or rest:
        raise RuntimeError(f"breakdown: {len(ordered)} kernels in {steps} steps")
    rows = [ordered[i : i + count] for i in range(0, len(ordered), count)]
    names = [short_name(span.name) for span in rows[0]]
    if any([short_name(span.name) for span in row] != names for row in rows):
        raise RuntimeError("breakdown: the kernels of the steps differ")
    per_replay = count * num_steps
    added = [
        span.end - ordered[i - 1].end
        for i, span in enumerate(ordered)
        if i % per_replay  # the first kernel of a replay has nothing before it
    ]
    places = [i % count for i in range(len(ordered)) if i % per_replay]
    return [
        Launch(
            name,
            median([row[place].end - row[place].start for row in rows]),
            median([a for a, at in zip(added, places, strict=True) if at == place]),
        )
        for place, name in enumerate(names)
    ]


def short_name(name: str) -> str:
    """A kernel's own name: no return type, namespaces, template or function arguments."""
    name = name.replace("(anonymous namespace)", "")
    bare, depth = [], 0
    for character in name:
        if character == "<":
            depth += 1
        elif character == ">":
            depth -= 1
        elif depth == 0:
            if character == "(":
                break
            bare.append(character)
    words = re.findall(r"\w+", "".join(bare))
    return words[-1] if words else name
