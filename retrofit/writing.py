"""Files appear under their name only when they are whole."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save

from retrofit.errors import BadInput
from retrofit.reading import DTYPES, HEADER_LEN_BYTES, read_json

STATE = "retrofit-state.json"
READABLE_BY_ALL = 0o644  # whatever the umask: a container's other user reads them


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write beside, then rename. The bytes depend on the value only."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file, written beside, flushed to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.part")
    # Not `save_file`: a full disk is an OSError here, and a SafetensorError there.
    data = save(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"format": "pt"},
    )
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(READABLE_BY_ALL)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class ShardWriter:
    """Writes a safetensors file one tensor at a time, in any order: only one is in memory.

    Args:
        path: appears when `close` is called, or at the end of a `with` block.
        specs: name -> (safetensors dtype, shape) of everything that will be written.
    """

    def __init__(self, path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.part")
        # Wide types first, so that each tensor is aligned to its own width.
        order = sorted(specs, key=lambda name: (-DTYPES[specs[name][0]].itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.start: dict[str, int] = {}
        self.specs = dict(specs)
        end = 0
        for name in order:
            dtype, shape = specs[name]
            size = math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [end, end + size],
            }
            self.start[name] = end
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % HEADER_LEN_BYTES)
        self.first = HEADER_LEN_BYTES + len(text)
        self.waiting = set(specs)
        self.file = self.temporary.open("wb")
        self.file.write(len(text).to_bytes(HEADER_LEN_BYTES, "little") + text)
        self.file.truncate(self.first + end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its place.

        Raises:
            ValueError: it is not what the header says.
        """
        dtype, shape = self.specs[name]
        if tensor.dtype != DTYPES[dtype] or tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{self.path.name}: {name} is {tensor.dtype} {list(tensor.shape)}; the layout has "
                f"{dtype} {list(shape)}"
            )
        data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
        self.file.seek(self.first + self.start[name])
        self.file.write(data)
        self.waiting.discard(name)

    def close(self) -> None:
        """Flush to the disk and rename.

        Raises:
            ValueError: a tensor was never written.
        """
        if self.waiting:
            raise ValueError(f"{self.path.name}: {min(self.waiting)} was never written")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.temporary.chmod(READABLE_BY_ALL)
        self.temporary.replace(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Close; after an exception, leave nothing behind."""
        try:
            if kind is None:
                self.close()
        finally:
            self.temporary.unlink(missing_ok=True)
            self.file.close()


class Partial:
    """The folder in which a command works until its result is whole: `DST.partial`.

    Args:
        dst: the result's name; must not exist.
        inputs: folders that are only read; dst must not be one of them or inside one.
        identity: what the result depends on. A folder left by a run with the same identity is
            continued; another one is refused.
    Raises:
        BadInput: dst exists, lies in an input, or a partial folder of something else is there.
    """

    def __init__(self, dst: Path, inputs: Iterable[Path], identity: Mapping[str, Any]) -> None:
        for path in inputs:
            if dst.resolve() == path.resolve() or path.resolve() in dst.resolve().parents:
                raise BadInput(f"{dst}: lies in {path}, which is only read")
        # A link to nothing does not exist, and no folder can be renamed to it.
        if dst.exists() or dst.is_symlink():
            raise BadInput(f"{dst}: exists; choose another name or remove it")
        self.dst = dst
        self.folder = dst.with_name(dst.name + ".partial")
        state = self.folder / STATE
        self.resumed = self.folder.exists()
        if self.resumed:
            if not state.exists() or read_json(state) != json.loads(json.dumps(identity)):
                raise BadInput(
                    f"{self.folder}: was left by a run with other inputs or options; finish that "
                    "run, or remove the folder"
                )
        else:
            self.folder.mkdir(parents=True)
            write_json(state, identity)

    def finish(self) -> None:
        """Remove what only a resumed run needs, and give the folder its name."""
        (self.folder / STATE).unlink()
        self.folder.rename(self.dst)

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
