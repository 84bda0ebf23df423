"""Where the numbers come from: commit, sources, libraries, device, command, date."""

from __future__ import annotations

import hashlib
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
    asked = provenance._git(REPOSITORY, "rev-parse", "HEAD")
    changes = provenance._git(REPOSITORY, "status", "--porcelain")
    return {
        "commit": asked or commit,
        "dirty": bool(changes) if asked and changes is not None else None,
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
        "command": command_line(sys.orig_argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def command_line(arguments: list[str]) -> str:
    """The command without the folders of the machine: of an absolute path the last name is kept."""
    kept: list[str] = []
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        if Path(value).is_absolute():
            value: Any = provenance.recorded(Path(value), REPOSITORY)
        kept.append(option + equals + value)
    return shlex.join(kept)
