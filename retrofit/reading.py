"""Safetensors checkpoints: headers of all shards, and single tensors on request.

Opening reads the headers only, so that a checkpoint of 160 GB opens in seconds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrofit.errors import BadInput

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
HEADER_LEN_BYTES = 8

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Entry:
    """One tensor, as its shard's header describes it; `start` counts from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        BadInput: absent, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{path}: does not exist") from error
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path}: not a JSON object")
    return value


def read_header(path: Path) -> dict[str, Entry]:
    """Tensors of a safetensors file, by name.

    Raises:
        BadInput: absent, truncated, too long, its header is not safetensors', or tensors overlap
            or leave a gap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(HEADER_LEN_BYTES)
            (length,) = struct.unpack("<Q", prefix) if len(prefix) == HEADER_LEN_BYTES else (size,)
            first = HEADER_LEN_BYTES + length
            if first > size:
                raise BadInput(f"{path}: truncated: {size} bytes do not hold its header")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise BadInput(f"{path}: does not exist") from error
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: its header is not safetensors JSON") from error
    try:
        header.pop("__metadata__", None)
        entries = {name: _entry(name, value, path, first) for name, value in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: its header is not safetensors JSON") from error
    end = max((e.start + e.num_bytes for e in entries.values()), default=first)
    if end != size:
        what = "truncated" if end > size else "too long"
        raise BadInput(f"{path}: {what}: the header describes {end} bytes, the file holds {size}")
    _check_order(path, entries, first)
    return entries


def _check_order(path: Path, entries: dict[str, Entry], first: int) -> None:
    """safetensors, and so every engine, refuses tensors that overlap or leave a gap."""
    end = first
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.num_bytes)):
        if entry.start != end or entry.num_bytes < 0:
            raise BadInput(
                f"{path}: its header has a gap or an overlap: {entry.name} begins at byte "
                f"{entry.start - first} of the data, and {end - first} are before it"
            )
        end += entry.num_bytes


def _entry(name: str, value: dict[str, Any], path: Path, first: int) -> Entry:
    dtype, shape = value["dtype"], tuple(value["shape"])
    start, end = value["data_offsets"]
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - start:
        raise BadInput(
            f"{path}: {name}: {dtype} {list(shape)} does not take the {end - start} bytes "
            "that the header gives it"
        )
    return Entry(name, dtype, shape, path, first + start, end - start)


def read_tensor(entry: Entry) -> torch.Tensor:
    """The tensor in memory.

    Raises:
        BadInput: a dtype that torch does not have.
    """
    if entry.dtype not in DTYPES:
        raise BadInput(f"{entry.path}: {entry.name}: dtype {entry.dtype} is not known here")
    data = np.fromfile(entry.path, np.uint8, entry.num_bytes, offset=entry.start)
    return torch.from_numpy(data).view(DTYPES[entry.dtype]).view(entry.shape)


@dataclass
class Checkpoint:
    """Config and tensor headers of a folder, and what was wrong with them."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    absent_shards: list[str] = field(default_factory=list)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            BadInput: there is none of that name.
        """
        if name not in self.entries:
            raise BadInput(f"{self.folder}: tensor {name} is missing")
        return read_tensor(self.entries[name])

    def shards(self) -> list[Path]:
        return sorted({entry.path for entry in self.entries.values()})


def scan(folder: Path) -> Checkpoint:
    """Read config, index and headers; every fault is collected, none raised.

    Raises:
        BadInput: no such folder, or no safetensors file in it.
        OSError: the folder may not be listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    # glob takes a folder that may not be listed for an empty one.
    found = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    if not found:
        raise BadInput(f"{folder}: no *.safetensors file")
    checkpoint = Checkpoint(folder)
    try:
        checkpoint.config = read_json(folder / CONFIG)
    except BadInput as error:
        checkpoint.faults.append(str(error))
    for path in found:
        try:
            header = read_header(path)
        except BadInput as error:
            checkpoint.faults.append(str(error))
            continue
        for name in sorted(header.keys() & checkpoint.entries.keys()):
            checkpoint.faults.append(
                f"{name}: in two files, {checkpoint.entries[name].path.name} and {path.name}"
            )
        checkpoint.entries |= header
    checkpoint.faults += index_faults(checkpoint, found)
    return checkpoint


def index_faults(checkpoint: Checkpoint, found: list[Path]) -> list[str]:
    """How the index and the files differ; shards that are only named go to `absent_shards`."""
    path, entries = checkpoint.folder / INDEX, checkpoint.entries
    if not path.exists() and len(found) == 1:
        return []
    try:
        weight_map = read_json(path).get("weight_map")
    except BadInput as error:
        return [str(error)]
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        return [f"{path}: no weight_map of names to files"]
    names = {p.name for p in found}
    checkpoint.absent_shards = sorted(set(weight_map.values()) - names)
    faults = []
    faults += [
        f"{INDEX}: does not list {shard}; vLLM drops such a file without a message"
        for shard in sorted(names - set(weight_map.values()))
    ]
    for name, shard in sorted(weight_map.items()):
        if name not in entries:
            if shard in names:
                faults.append(f"{INDEX}: {name} is not in {shard}")
        elif entries[name].path.name != shard:
            faults.append(f"{INDEX}: {name} is in {entries[name].path.name}, not in {shard}")
    unlisted = sorted(n for n in entries.keys() - weight_map.keys())
    faults += [
        f"{INDEX}: does not list {name} of {entries[name].path.name}"
        for name in unlisted
        if entries[name].path.name in set(weight_map.values())
    ]
    return faults


def absent_faults(checkpoint: Checkpoint) -> list[str]:
    """One fault for each shard that the index names and that is not there."""
    return [f"{INDEX}: names {shard}, which does not exist" for shard in checkpoint.absent_shards]


def open_checkpoint(folder: Path, partial: bool = False) -> Checkpoint:
    """`scan`, for commands that need a sound checkpoint.

    Args:
        folder: see `scan`.
        partial: shards may be absent, as when only those with the head were downloaded.
    Raises:
        BadInput: the first fault, and how many there are.
    """
    checkpoint = scan(folder)
    faults = checkpoint.faults + ([] if partial else absent_faults(checkpoint))
    refuse(folder, faults)
    return checkpoint


def check_small_files(folder: Path) -> None:
    """Whether the files that a result takes over besides weights may be read.

    Raises:
        BadInput: the first that may not.
    """
    for path in sorted(folder.iterdir()):
        if (
            path.is_file()
            and path.suffix != ".safetensors"
            and not os.access(path, os.R_OK, effective_ids=True)
        ):
            raise BadInput(f"{path}: {os.strerror(errno.EACCES)}")


def refuse(folder: Path, faults: list[str]) -> None:
    """Raise BadInput with the first fault and the number of others, if there is one."""
    if faults:
        more = len(faults) - 1
        raise BadInput(f"{folder}: {faults[0]}" + (f" (and {more} more)" if more else ""))


def headers_sha256(checkpoint: Checkpoint, shards: list[Path] | None = None) -> str:
    """Digest of config.json and of each shard's name, size and header: quick at any size.

    Args:
        checkpoint: without faults.
        shards: which; all by default.
    """
    digest = hashlib.sha256((checkpoint.folder / CONFIG).read_bytes())
    for path in checkpoint.shards() if shards is None else shards:
        with path.open("rb") as file:
            prefix = file.read(HEADER_LEN_BYTES)
            header = file.read(struct.unpack("<Q", prefix)[0])
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + header)
    return digest.hexdigest()
