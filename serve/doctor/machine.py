"""Reads of a machine, all of them: files, folders, commands, limits. Values of JSON only.

A recording is one JSON file of every read and its answer. Played back it gives the same findings on
any other machine: that is how the checks are tested, and what an owner can send with a question.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.checkpoint import check_checkpoint
from serve.engine import REPOSITORY, installed_wheel
from serve.environment import cache_path, given_variables
from serve.errors import CheckpointError, ConfigError

SCHEMA_VERSION = 1
OUT = "{out}"  # in a command: the file that it is to write
PYTHON = "python"  # in a command: this interpreter
MAX_FILE_BYTES = 4096  # of PCI configuration space, and more than any other file has
# Variables of the caller that change how ranks reduce; no others are read or recorded.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "NCCL_PROTO", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL")
VARIABLES += ("NCCL_SHM_DISABLE", "VLLM_NCCL_SO_PATH")
NOT_FOUND = 127


@dataclass(frozen=True)
class Output:
    """Of a command. status None: it did not end in time and was killed. file: what it wrote."""

    status: int | None
    out: str
    err: str
    file: str | None = None

    @property
    def last_line(self) -> str:
        """Of what it said, errors first."""
        said = self.err.strip() or self.out.strip() or f"exit status {self.status}"
        return said.splitlines()[-1]


class Machine:
    """Reads this machine.

    Args:
        record: reads are also kept in it, for `save`.
    """

    def __init__(self, record: bool = False) -> None:
        self.recording: dict[str, dict[str, Any]] | None = {} if record else None

    def _read(self, kind: str, key: str, read: Callable[[], Any]) -> Any:
        value = read()
        if self.recording is not None:
            self.recording.setdefault(kind, {})[key] = value
        return value

    def text(self, path: str) -> str | None:
        """A small file, stripped; None where it is absent or may not be read."""

        def read() -> str | None:
            data = _start_of(path)
            return None if data is None else data.decode("utf-8", "replace").strip()

        return self._read("text", path, read)

    def data(self, path: str) -> bytes | None:
        """The first 4096 bytes of a file, less zeros at the end of more than 64."""

        def read() -> str | None:
            data = _start_of(path)
            return None if data is None else data[:64].hex() + data[64:].rstrip(b"\0").hex()

        value = self._read("data", path, read)
        return None if value is None else bytes.fromhex(value)

    def names(self, path: str) -> list[str]:
        """Of the entries of a folder; none where it is absent."""

        def read() -> list[str]:
            try:
                return sorted(os.listdir(path))  # noqa: PTH208 (a name, not a path, is wanted)
            except OSError:
                return []

        return self._read("names", path, read)

    def real(self, path: str) -> str | None:
        """Where a link leads in the end; None where there is nothing."""

        def read() -> str | None:
            try:
                return str(Path(path).resolve(strict=True))
            except OSError:
                return None

        return self._read("real", path, read)

    def space(self, path: str) -> tuple[int, int] | None:
        """Bytes in total and free of the file system of a path, or of its nearest parent."""

        def read() -> list[int] | None:
            place = Path(path)
            while not place.exists() and place != place.parent:
                place = place.parent
            try:
                usage = shutil.disk_usage(place)
            except OSError:
                return None
            return [usage.total, usage.free]

        value = self._read("space", path, read)
        return None if value is None else (value[0], value[1])

    def run(self, command: Sequence[str], timeout_s: float) -> Output:
        """Run a command to its end or its timeout; it and its group are dead then."""
        value = self._read("commands", shlex.join(command), lambda: _run(command, timeout_s))
        return Output(**value)

    def port_problem(self, host: str, port: int) -> str:
        """Why nothing can listen there; empty when something can."""

        def read() -> str:
            try:
                family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
                socket.create_server(address, family=family).close()
            except OSError as error:
                return error.strerror or str(error)
            return ""

        return self._read("ports", f"{host}:{port}", read)

    def checkpoint_problem(self, folder: str, num_speculative_tokens: int) -> str:
        """Why `serve run` would refuse a checkpoint; empty where it would not."""

        def read() -> str:
            try:
                check_checkpoint(Path(folder), num_speculative_tokens)
            except CheckpointError as error:
                return str(error)
            return ""

        return self._read("checkpoints", folder, read)

    def fact(self, name: str) -> Any:
        """One of FACTS."""
        return self._read("facts", name, FACTS[name])

    def save(self, path: Path) -> None:
        """Write the recording under a temporary name, then rename.

        Raises:
            ConfigError: it cannot be written.
        """
        data = {"schema_version": SCHEMA_VERSION, **(self.recording or {})}
        partial = path.with_name(f"{path.name}.partial")
        try:
            partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise ConfigError(f"--record {path}: {error.strerror}") from error


class RecordedMachine(Machine):
    """Answers from a recording. What was not asked then is absent now; so is a new command.

    Raises:
        ConfigError: the file is no recording.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self.played = json.loads(path.read_text(encoding="utf-8"))
            version = self.played["schema_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--machine {path}: is no recording: {error}") from error
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"--machine {path}: schema_version = {version!r}; must be {SCHEMA_VERSION}"
            )

    def _read(self, kind: str, key: str, read: Callable[[], Any]) -> Any:
        absent: dict[str, Any] = {"names": [], "ports": "", "checkpoints": ""}
        absent["commands"] = {"status": NOT_FOUND, "out": "", "err": f"{key}: not recorded"}
        return self.played.get(kind, {}).get(key, absent.get(kind))


def _start_of(path: str) -> bytes | None:
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_FILE_BYTES)
    except OSError:
        return None


def _run(command: Sequence[str], timeout_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        words = [sys.executable if word == PYTHON else word for word in command]
        words = [word.replace(OUT, str(out)) for word in words]
        try:
            process = subprocess.Popen(
                words,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,
            )
        except OSError as error:
            text = f"{command[0]}: {error.strerror}"
            return {"status": NOT_FOUND, "out": "", "err": text, "file": None}
        said, err, status = "", "", None
        try:
            said, err = process.communicate(timeout=timeout_s)
            status = process.returncode
        except subprocess.TimeoutExpired:
            pass
        finally:
            if status is None:  # it runs, or it has ended and what it started holds its output
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                _close(process)
        file = out.read_text(encoding="utf-8") if out.exists() else None
        return {"status": status, "out": said, "err": err, "file": file}


def _close(process: subprocess.Popen[str]) -> None:
    """Of one that was killed. What waits in the driver may not die; we do not wait for it long."""
    try:
        process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        for stream in (process.stdout, process.stderr):
            stream.close()


def _site_packages() -> str | None:
    spec = importlib.util.find_spec("vllm")
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parents[1])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


FACTS: dict[str, Callable[[], Any]] = {
    "uid": os.getuid,
    "memlock_bytes": lambda: resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],  # -1: no limit
    "open_files": lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "cache_folder": lambda: str(cache_path("")),
    "site_packages": _site_packages,
    "wheel": installed_wheel,
    "nccl": lambda: _version("nvidia-nccl-cu13"),
    "environment": lambda: given_variables(VARIABLES),
    "container": lambda: Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
}
