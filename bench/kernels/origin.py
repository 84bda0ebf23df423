"""Where the numbers come from: commit, sources, libraries, device, command, date."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench import provenance
from bench.kernels.gpu import DeviceInfo
from kernels import build

REPOSITORY = Path(__file__).resolve().parents[2]


def collect(info: DeviceInfo, libraries: dict[str, Path | None], commit: str | None) -> dict:
    """Return the provenance block.

    Args:
        libraries: vLLM's, by name; their hashes are recorded.
        commit: used where git does not tell.
    """
    checkout = provenance.checkout(REPOSITORY)
    return {
        "commit": checkout["commit"] or commit,
        "dirty": checkout["dirty"] if checkout["commit"] else None,
        "vllm": provenance.vllm_version(),
        "series_sha256": provenance.series_sha256(REPOSITORY / "patches"),
        "kernel_sources_sha256": build.sources_sha256(),
        "libraries_sha256": {
            name: file_sha256(path) for name, path in libraries.items() if path is not None
        },
        "device": info.name,
        **{name: value for name, value in asdict(info).items() if name != "name"},
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "command": provenance.command_line(sys.orig_argv, REPOSITORY),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
