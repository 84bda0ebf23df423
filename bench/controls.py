"""Heads that must be accepted less often: the measurement of acceptance must be able to fail."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HEAD_SHARD = "model-mtp-w4a16.safetensors"
EXPERT = re.compile(r"(mtp\.0\.ffn\.experts\.)(\d+)\.(w[123])\.(.+)")
Tensors = dict[str, torch.Tensor]


class Control(StrEnum):
    """What is done to the routed experts of the head."""

    ZEROED = "zeroed"
    SHUFFLED = "shuffled"
    HALVED = "scales halved"


def zeroed(tensors: Tensors) -> Tensors:
    """Every scale 0: the routed experts give nothing."""
    return _scaled(tensors, 0.0)


def halved(tensors: Tensors) -> Tensors:
    """Every scale half: each projection at half its strength."""
    return _scaled(tensors, 0.5)


def _scaled(tensors: Tensors, factor: float) -> Tensors:
    return {
        name: tensor * factor
        if (m := EXPERT.fullmatch(name)) and m[4] == "weight_scale"
        else tensor
        for name, tensor in tensors.items()
    }


def shuffled(tensors: Tensors) -> Tensors:
    """Each projection of an expert comes from another expert: w1, w2, w3 by 1, 2, 3 places."""
    numbers = {int(m[2]) for name in tensors if (m := EXPERT.fullmatch(name))}
    count = max(numbers) + 1
    result = {}
    for name, tensor in tensors.items():
        if m := EXPERT.fullmatch(name):
            other = (int(m[2]) + int(m[3][1])) % count
            tensor = tensors[f"{m[1]}{other}.{m[3]}.{m[4]}"]
        result[name] = tensor
    return result


CHANGES: dict[Control, Callable[[Tensors], Tensors]] = {
    Control.ZEROED: zeroed,
    Control.SHUFFLED: shuffled,
    Control.HALVED: halved,
}


def make_control(source: Path, target: Path, control: Control) -> Path:
    """Write a copy of a checkpoint with its head changed; other weights are hard links.

    Raises:
        ValueError: the head's shard holds no packed experts.
    """
    tensors = load_file(source / HEAD_SHARD)
    if not any(EXPERT.fullmatch(name) for name in tensors):
        raise ValueError(f"{source / HEAD_SHARD}: no tensor mtp.0.ffn.experts.*")
    temporary = target.with_name(f".{target.name}.part")
    for folder in (temporary, target):
        if folder.exists():
            shutil.rmtree(folder)
    temporary.mkdir(parents=True)
    for path in source.iterdir():
        if path.name == HEAD_SHARD:
            changed = {name: t.contiguous() for name, t in CHANGES[control](tensors).items()}
            save_file(changed, temporary / path.name, metadata={"format": "pt"})
        elif path.suffix == ".safetensors":
            os.link(path, temporary / path.name)
        else:
            shutil.copyfile(path, temporary / path.name)
    temporary.replace(target)
    return target
