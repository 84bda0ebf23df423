"""`quantize-base`: the original checkpoint in W4A16-FP8, without data, one tensor at a time.

check -> plan shards -> convert each weight -> index, config, other files -> rename.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from kernels.weights import (
    EXPERT_DTYPE,
    QUANTIZATION_CONFIG,
    Layout,
    Weight,
    head_weights,
    tensors,
    trunk_weights,
)
from retrofit import pack
from retrofit.errors import BadInput
from retrofit.experts import Scale
from retrofit.holes import hole_faults
from retrofit.layout import check_sizes, compare_head, compare_original_trunk
from retrofit.progress import Progress
from retrofit.reading import (
    CONFIG,
    DTYPES,
    INDEX,
    Checkpoint,
    check_small_files,
    headers_sha256,
    open_checkpoint,
    refuse,
)
from retrofit.writing import Partial, ShardWriter, write_json


class Head(StrEnum):
    """What happens to the MTP head: lost, as in the published bases, or rounded to nearest."""

    DROP = "drop"
    RTN = "rtn"


@dataclass(frozen=True)
class QuantizeBaseConfig:
    """Options of `quantize-base`."""

    source: Path
    dst: Path
    mtp: Head = Head.DROP
    scale: Scale = Scale.MSE
    shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "mtp", Head(self.mtp))
        object.__setattr__(self, "scale", Scale(self.scale))
        if self.shard_bytes < 1:
            raise BadInput(f"shard_bytes = {self.shard_bytes}; must be positive")


def run(config: QuantizeBaseConfig) -> int:
    """See the module."""
    source = open_checkpoint(config.source)
    check_source(source, with_head=config.mtp == Head.RTN)
    check_small_files(source.folder)
    options = {k: v for k, v in asdict(config).items() if k not in ("source", "dst")}
    identity = {
        "command": "quantize-base",
        "source": headers_sha256(source),
        **{key: str(value) for key, value in options.items()},
    }
    files = {"source": source.shards()}
    with Partial(config.dst, [config.source], identity, files) as partial:
        if not partial.whole:
            write_checkpoint(config, source, partial.folder)
        partial.finish()
    print(f"{config.dst}: written")
    return 0


def check_source(source: Checkpoint, with_head: bool) -> None:
    """Whether the original is complete.

    Raises:
        BadInput: the first fault.
    """
    check_sizes(source.config, source.folder / CONFIG)
    faults = compare_original_trunk(source.config, source.entries)
    if with_head:
        faults += compare_head(source.config, source.entries, Layout.ORIGINAL)
    refuse(source.folder, faults or hole_faults(source.entries.values()))


def plan(config: QuantizeBaseConfig, model: dict[str, Any]) -> Iterator[list[Weight]]:
    """Weights of each shard, in the model's order, at most shard_bytes unless one is larger."""
    weights = list(trunk_weights(model))
    if config.mtp == Head.RTN:
        weights += head_weights(model)
    shard: list[Weight] = []
    size = 0
    for weight in weights:
        specs = {s.name: (s.dtypes[0], s.shape) for s in tensors(weight, Layout.W4A16)}
        num_bytes = sum(spec_bytes(*spec) for spec in specs.values())
        if shard and size + num_bytes > config.shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(weight)
        size += num_bytes
    yield shard


def spec_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def write_checkpoint(config: QuantizeBaseConfig, source: Checkpoint, folder: Path) -> None:
    """Write shards that are not there yet, then the rest."""
    shards = list(plan(config, source.config))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    there = [(folder / name).exists() for name in names]
    total = sum(len(shard) for shard in shards)
    before = sum(len(s) for s, exists in zip(shards, there, strict=True) if exists)
    progress = Progress("quantize-base", total, before)
    weight_map: dict[str, str] = {}
    size = 0
    for name, shard, exists in zip(names, shards, there, strict=True):
        specs = {s.name: (s.dtypes[0], s.shape) for w in shard for s in tensors(w, Layout.W4A16)}
        weight_map |= dict.fromkeys(specs, name)
        size += sum(spec_bytes(*spec) for spec in specs.values())
        if exists:
            continue
        with ShardWriter(folder / name, specs) as writer:
            for weight in shard:
                for tensor_name, tensor in pack.convert(source, weight, config.scale).items():
                    writer.write(tensor_name, tensor)
                progress.step()
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    copy_other_files(source.folder, folder)
    write_json(folder / CONFIG, base_config(source.config))


def base_config(config: dict[str, Any]) -> dict[str, Any]:
    """The original's config.json with the quantization of the result."""
    quantization = json.loads(json.dumps(QUANTIZATION_CONFIG))
    return {**config, "expert_dtype": EXPERT_DTYPE, "quantization_config": quantization}


def copy_other_files(source: Path, folder: Path) -> None:
    """Tokenizer and the like: every plain file that is not weights, index or config."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, CONFIG):
            shutil.copyfile(path, folder / path.name)
