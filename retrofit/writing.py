"""Files appear under their name only when they are whole."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save

from kernels.folder_lock import FolderHeld, FolderLock
from retrofit.errors import BadInput
from retrofit.reading import DTYPES, HEADER_LEN_BYTES, read_json

# What only an unfinished result holds.
STATE, LOCK = "retrofit-state.json", "retrofit.lock"
READABLE_BY_ALL = 0o644  # whatever the umask: a container's other user reads them


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Written beside, flushed to the disk, then renamed. The bytes depend on the value only."""
    _write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file, written beside, flushed to the disk, then renamed."""
    # Not `save_file`: a full disk is an OSError here, and a SafetensorError there.
    data = save(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"format": "pt"},
    )
    _write_whole(path, data, READABLE_BY_ALL)


def _write_whole(path: Path, data: bytes, mode: int | None = None) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
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

    Use it in a `with` block: the folder is this run's own until the end of it. Bad input that is
    found before any work is done leaves nothing; after that, everything is kept.

    Args:
        dst: the result's name; must not exist, unless as what a run of the same identity had
            renamed but not yet cleaned up when it ended: then `whole` is true.
        inputs: folders that are only read; dst must not be one of them or inside one.
        identity: what the result depends on. A folder left by a run with the same identity is
            continued; another one is refused.
        files: by what they are of, those whose contents the result takes over. One that changed
            since the folder was begun is refused: no result is made of both.
        parts: the folder inside it for results of single steps, which the result does not hold;
            None: each shard is such a step.
    Raises:
        BadInput: dst exists, lies in an input, another run holds the folder, or a partial folder
            of something else is there.
    """

    def __init__(
        self,
        dst: Path,
        inputs: Iterable[Path],
        identity: Mapping[str, Any],
        files: Mapping[str, Iterable[Path]],
        parts: str | None = None,
    ) -> None:
        for path in inputs:
            if dst.resolve() == path.resolve() or path.resolve() in dst.resolve().parents:
                raise BadInput(f"{dst}: lies in {path}, which is only read")
        self.dst, self.parts = dst, parts
        self.whole = (dst / STATE).exists()
        self.folder = dst
        if not self.whole:
            self._refuse_dst()
            self.folder = dst.with_name(dst.name + ".partial")
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._hold()
        try:
            self._begin(identity, files)
        except BaseException:
            self._release()
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # only where it is empty
            raise

    def _refuse_dst(self) -> None:
        # A link to nothing does not exist, and no folder can be renamed to it.
        if self.dst.exists() or self.dst.is_symlink():
            raise BadInput(f"{self.dst}: exists; choose another name or remove it")

    def _hold(self) -> FolderLock:
        with contextlib.suppress(FileNotFoundError):  # one that was refused removed its folder
            try:
                lock = FolderLock(self.folder, f"writes {self.dst.name}", LOCK)
            except FolderHeld as error:
                raise BadInput(
                    f"{self.folder}: is held by {error}; one run works in a folder at a time"
                ) from None
            if lock.stands():
                return lock
            lock.release()
        raise BadInput(f"{self.folder}: another run ended in it just now; start the command again")

    def _begin(self, identity: Mapping[str, Any], files: Mapping[str, Iterable[Path]]) -> None:
        """Compare with what an earlier run left, or note what this one is of."""
        state = self.folder / STATE
        nothing = {LOCK, f".{STATE}.part"}  # of a run that ended before it wrote its state
        self.resumed = any(path.name not in nothing for path in self.folder.iterdir())
        found = read_json(state) if state.exists() else {}
        same = found.get("identity") == json.loads(json.dumps(identity))
        now = {f"{of}/{path.name}": (path, stamp(path)) for of in files for path in files[of]}
        changed = [
            path for key, (path, value) in now.items() if found.get("files", {}).get(key) != value
        ]
        # For a folder that is not `whole`: dst may have appeared since it was looked for.
        if not self.whole or not same or changed:
            self._refuse_dst()
        if not self.resumed:
            stamps = {key: value for key, (_, value) in now.items()}
            write_json(state, {"identity": identity, "files": stamps})
        elif not same:
            raise BadInput(
                f"{self.folder}: was left by a run with other inputs or options; finish that "
                "run, or remove the folder"
            )
        elif changed:
            raise BadInput(
                f"{changed[0]}: has changed since {self.folder} was begun; bring it back, or "
                "remove that folder to begin anew"
            )

    def finish(self) -> None:
        """Give the folder its name, then remove what only a resumed run needs.

        In this order, a run that ends in between loses nothing.

        Raises:
            BadInput: it is not the folder that was held.
        """
        if not self._lock.stands():
            raise BadInput(f"{self.folder}: was moved or removed while this run worked in it")
        if not self.whole:
            self.folder.rename(self.dst)
        if self.parts and (self.dst / self.parts).exists():
            shutil.rmtree(self.dst / self.parts)
        (self.dst / LOCK).unlink(missing_ok=True)
        # The last: as long as it is there, the same command cleans up.
        (self.dst / STATE).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        try:
            if isinstance(error, BadInput) and self._lock.stands():
                work = self.folder / (self.parts or "")
                if self.resumed or any(work.glob("*.safetensors")):
                    raise BadInput(f"{error}; what was done before is kept in {self.folder}")
                shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock.stands():
            (self.folder / LOCK).unlink()
        self._lock.release()


def stamp(path: Path) -> list[int]:
    """Size in bytes and time of the last change in ns, of what a link leads to."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
