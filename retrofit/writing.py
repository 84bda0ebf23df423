"""Files appear under their name only when they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

READABLE_BY_ALL = 0o644  # safetensors writes 0600, which a container's other user cannot read


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write beside, then rename. The bytes depend on the value only."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file, written beside, flushed to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.part")
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        temporary,
        metadata={"format": "pt"},
    )
    temporary.chmod(READABLE_BY_ALL)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
