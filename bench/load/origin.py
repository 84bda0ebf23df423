"""Where a load result comes from: this repository, the server's model and the GPUs if local."""

from __future__ import annotations

import hashlib
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import provenance
from bench.load import behind
from bench.load.server import ServerFacts
from bench.load.telemetry import Telemetry, is_local

REPOSITORY = Path(__file__).resolve().parents[2]
# A larger checkpoint is known by its index: reading 156 GB would take minutes of disk time.
MOST_BYTES_HASHED = 1 << 30
# What a run that goes on must find again, if it was known. Not `dirty`: the journal itself is new.
_LASTING = ("commit", "series_sha256", "checkpoint_sha256", "checkpoint_index_sha256", "device")


def collect(facts: ServerFacts, url: str, telemetry: Telemetry) -> dict[str, Any]:
    """Return the provenance block. What only the server's machine knows is None elsewhere."""
    local = is_local(url)
    return {
        **provenance.checkout(REPOSITORY),
        "vllm": facts.version,
        "series_sha256": provenance.series_sha256(REPOSITORY / "patches"),
        **checkpoint_hashes(Path(facts.root) if facts.root and local else None),
        "device": provenance.cpu_model() if local else None,
        "cores": len(os.sched_getaffinity(0)) if local else None,
        # Of the last minute, before warm-up: above the cores in use, others had work here.
        "load_average": round(os.getloadavg()[0], 2) if local else None,
        "gpus": telemetry.devices(),
        "server": behind.describe(url, REPOSITORY) if local else None,
        "command": provenance.command_line(sys.orig_argv, REPOSITORY),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def lasting(provenance: dict[str, Any]) -> dict[str, Any]:
    """What two lives of one server share; a GPU's link does not stay, it rests when idle."""
    gpus = provenance["gpus"] or ()
    return {name: provenance[name] for name in _LASTING} | {
        "gpus": [f"{g['name']}, driver {g['driver']}, {g['power_limit_w']:g} W" for g in gpus]
    }


def checkpoint_hashes(folder: Path | None) -> dict[str, str | None]:
    """Hash of all weights of a small checkpoint, of the index of a large one, None elsewhere."""
    hashes: dict[str, str | None] = {"checkpoint_sha256": None, "checkpoint_index_sha256": None}
    if folder is None or not (folder / "config.json").exists():
        return hashes
    index = folder / "model.safetensors.index.json"
    if index.exists():
        hashes["checkpoint_index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    if sum(p.stat().st_size for p in folder.glob("*.safetensors")) <= MOST_BYTES_HASHED:
        hashes["checkpoint_sha256"] = provenance.checkpoint_sha256(folder)
    return hashes
