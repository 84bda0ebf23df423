"""A folder that passes for one that `make kernels` filled; what is in it cannot be loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from kernels import build


def write_library(folder: Path, architectures: tuple[str, ...] = build.ARCHITECTURES) -> Path:
    """An empty library with the stamp of the sources that are there; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / build.LIBRARY).touch()
    stamp = build.Stamp(build.sources_sha256(), architectures, "13.0.88", (), ())
    (folder / build.STAMP).write_text(json.dumps(asdict(stamp)), encoding="utf-8")
    return folder
