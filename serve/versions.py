"""Which code serves: ours, vLLM's, the patches'."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel

from serve.engine import REPOSITORY, installed_wheel


class Versions(BaseModel):
    """None: not installed, not a checkout, no driver.

    lock_sha256: of patches/vllm.lock, which names the vLLM pin and the patched files together.
    """

    dsv4_maxq: str | None
    commit: str | None
    vllm: str | None
    lock_sha256: str | None
    torch: str | None
    python: str
    driver: str | None = None


def collect_versions(repository: Path = REPOSITORY) -> Versions:
    """Read once at start; nothing is imported for it."""
    wheel = installed_wheel()
    return Versions(
        dsv4_maxq=installed("dsv4-maxq"),
        commit=commit(repository),
        vllm=f"{wheel} {installed(wheel)}" if wheel else None,
        lock_sha256=sha256(repository / "patches" / "vllm.lock"),
        torch=installed("torch"),
        python=platform.python_version(),
    )


def installed(name: str) -> str | None:
    """The version of a distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def sha256(path: Path) -> str | None:
    """A file's hash; None without the file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def commit(repository: Path) -> str | None:
    """The checkout's commit, marked where files differ from it."""
    command = ["git", "-C", repository, "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
