"""Calibration rows of the tiny model, and ways to copy, digest and break folders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from retrofit.calibration import CalibrationWriter
from retrofit.reading import CONFIG, INDEX

NUM_EXPERTS, HIDDEN, TOPK = 16, 256, 2
HEAD_LAYER = 4


def calibration_rows(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated inputs; experts 0 and 1 have most rows, the others few."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(1234))
    hidden = torch.randn(rows, 32, generator=generator) @ mix * 0.2
    hidden += 0.2 * torch.randn(rows, HIDDEN, generator=generator)
    share = torch.ones(NUM_EXPERTS)
    share[:2] = 6.0
    ids = torch.multinomial(share.expand(rows, -1), TOPK, generator=generator)
    return hidden, ids, torch.rand(rows, TOPK, generator=generator)


def write_calibration(folder: Path, rows: int = 1600, **meta) -> Path:
    values = {"model_sha256": "0" * 64, "layers": [HEAD_LAYER], **meta}
    writer = CalibrationWriter(folder, 10**9, rows_per_file=1000, meta=values)
    writer.append(*calibration_rows(rows))
    writer.flush(prompts=1)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    """A copy whose files may be replaced, not written into: weights are hard links."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            os.link(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
    return target


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    edit_json(folder / CONFIG, change)


def config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A case: `config.json` with this change."""
    return lambda folder: edit_config(folder, change)


def group(name: str, **values) -> Callable[[Path], None]:
    """A case: other entries of a config group; None takes one away."""

    def change(settings: dict) -> None:
        target = settings["quantization_config"]["config_groups"][name]
        for key, value in values.items():
            target.pop(key) if value is None else target.__setitem__(key, value)

    return config(change)


def weights(name: str, **values) -> Callable[[Path], None]:
    """A case: other weights of a config group."""

    def change(settings: dict) -> None:
        settings["quantization_config"]["config_groups"][name]["weights"] |= values

    return config(change)


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    edit_json(folder / INDEX, lambda index: change(index["weight_map"]))


def edit_tensors(
    folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    """Change the tensors of the shard that holds `name`, and the index with them."""
    shard = json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(folder / shard)
    before = set(tensors)
    change(tensors)
    (folder / shard).unlink()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / shard)

    def update(weight_map: dict) -> None:
        for gone in before - tensors.keys():
            del weight_map[gone]
        for new in tensors.keys() - before:
            weight_map[new] = shard

    edit_index(folder, update)
