"""Hand-made results: the figures of rounds whose timing is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.load import config as config_module
from bench.load import summary
from bench.load.config import Cell, LoadConfig
from bench.load.counters import Counters
from bench.load.rounds import Round
from bench.load.trace import Chunk, Speculation, Trace
from bench.load.warmup import WarmUp

TOKENS = 9
REPEATS = 6


def make_round(
    number: int, repeat: int, streams: int, depth: int, gap_s: float, ttft_s: float, mtp: bool
) -> Round:
    """A round of streams that all have one timing; under MTP two tokens come in a chunk."""
    size = 2 if mtp else 1
    at = ttft_s
    chunks = [Chunk(at, 1)]
    while sum(c.num_tokens or 0 for c in chunks) < TOKENS:
        at += gap_s
        chunks.append(Chunk(at, size))
    speculation = Speculation(4, 4, 4, (0, 4)) if mtp else None
    trace = Trace(0.0, tuple(chunks), depth, TOKENS, 0, "length", speculation)
    drafts = 4 * streams if mtp else None
    moved = Counters(
        generation_tokens=TOKENS * streams, num_drafts=drafts, num_draft_tokens=drafts,
        num_accepted_tokens=drafts, accepted_per_position=(drafts,) if drafts else None,
    )  # fmt: skip
    return Round(number, repeat, (trace,) * streams, moved, 0, at)


def make_result(
    slower: float = 1.0,
    noise: Sequence[float] = (1.0, 1.02, 0.98, 1.01, 0.99, 1.0),
    mtp: bool = False,
    streams: Sequence[int] = (1, 2),
    label: str | None = None,
    **config: Any,
) -> dict[str, Any]:
    """A result of one repeat for each entry of `noise`, by which all its times are stretched."""
    asked = LoadConfig(
        contexts=(1000,), streams=tuple(streams), output=TOKENS, repeats=len(noise), label=label,
        **config,
    )  # fmt: skip
    cells = asked.cells(4096)
    entries = []
    for number, cell in enumerate(cells):
        done = [
            make_round(
                number, i, cell.streams, cell.depth, 0.01 * slower * x, 0.1 * slower * x, mtp
            )
            for i, x in enumerate(noise)
        ]
        entries.append(summary.summarize(Cell(**asdict(cell)), done, asked))
    return {
        "schema_version": 1,
        "kind": "load",
        "label": label,
        "config": config_module.to_json(asked),
        "server": {
            "model": "fake", "window": 4096, "version": "0.0", "cache": None, "checkpoint": None,
        },
        "provenance": {
            "commit": "c" * 40, "dirty": False, "vllm": "0.0", "series_sha256": "s",
            "checkpoint_sha256": None, "checkpoint_index_sha256": None, "device": "a CPU",
            "cores": 2, "gpus": None, "server": None, "command": "bench run",
            "date": "2026-11-24T10:00:00+00:00",
        },
        "warm_up": [asdict(WarmUp(1, 10, (1.0, 1.0), True))],
        "cells": entries,
    }  # fmt: skip
