"""The server behind a port of this machine: its commands, its variables, its container's image.

Of what `serve` starts, the engine is a child with variables of its own, so the whole tree counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench import provenance

PROC = Path("/proc")
# What says how ranks reduce, which cards are seen and how many threads run; never a key.
SHOWN = ("NCCL_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "VLLM_", "DSV4_")
HIDDEN = ("KEY", "TOKEN", "SECRET", "PASSWORD")
SECRET_OPTIONS = ("--api-key", "--hf-token")
FORWARDERS = ("ssh", "kubectl")  # listen here for a server elsewhere
REVISION_LABEL = "org.opencontainers.image.revision"
LISTENING = "0A"  # state of /proc/net/tcp
DOCKER_S = 20


def describe(url: str, repository: Path) -> dict[str, Any] | None:
    """Who answers at a URL of this machine; None where that cannot be seen.

    Returns:
        commands: of the process that listens and of its children, without keys and folders.
        environment: variables of the tree that begin with SHOWN; the deepest process wins.
        image: name, id, digests and commit of the container's image; None outside a container.
    """
    port = _port(url)
    container = _container(port)
    pid = container["State"]["Pid"] if container else _listener(port)
    if pid is None:
        return None
    tree = _tree(pid)
    environment: dict[str, str] = {}
    for entries in ((container or {}).get("Config", {}).get("Env") or (), *map(_environ, tree)):
        environment |= _shown(entries, repository)
    commands = [_command(one, repository) for one in tree if one == pid or _parent(one) == pid]
    return {
        "commands": [command for command in commands if command],
        "environment": dict(sorted(environment.items())),
        "image": _image(container) if container else None,
    }


def is_forwarded(url: str) -> bool:
    """Whether what listens at a URL of this machine is a tunnel to another."""
    pid = _listener(_port(url))
    try:
        return pid is not None and (PROC / str(pid) / "comm").read_text().strip() in FORWARDERS
    except OSError:
        return False


def _port(url: str) -> int:
    return urlsplit(url).port or {"http": 80, "https": 443}[urlsplit(url).scheme]


def _listener(port: int) -> int | None:
    """The process that listens; of several that share the socket, the one that made the others."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    found = {pid for pid in _pids() if sockets & set(_open_files(pid))} if sockets else set()
    return min((pid for pid in found if _parent(pid) not in found), default=None)


def _listening_inodes(port: int) -> Iterable[str]:
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _pids() -> Iterable[int]:
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())


def _open_files(pid: int) -> Iterable[str]:
    with contextlib.suppress(OSError):  # of another user, or gone
        for entry in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield str(entry.readlink())


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    return None


def _tree(pid: int) -> list[int]:
    """The process and all that came of it, parents before children."""
    children: dict[int | None, list[int]] = {}
    for one in sorted(_pids()):
        children.setdefault(_parent(one), []).append(one)
    tree = [pid]
    for one in tree:  # grows while it is read
        tree += children.get(one, ())
    return tree


def _environ(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / "environ").read_bytes().decode("utf-8", "replace").split("\0")
    return []


def _shown(entries: Iterable[str], repository: Path) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in entries)
    return {
        name: _plain(value, repository)
        for name, _, value in pairs
        if name.startswith(SHOWN) and not any(word in name for word in HIDDEN)
    }


def _plain(value: str, repository: Path) -> str:
    path = Path(value)
    return str(provenance.recorded(path, repository)) if path.is_absolute() else value


def _command(pid: int, repository: Path) -> str | None:
    try:
        raw = (PROC / str(pid) / "cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return None
    arguments = [part for part in raw.split("\0") if part]
    secret = False  # vLLM takes several keys after one option
    for at, argument in enumerate(arguments):
        name, equals, _ = argument.partition("=")
        if name.startswith("--"):
            # An option may be cut short, as `--api-k`.
            hidden = any(option.startswith(name.replace("_", "-")) for option in SECRET_OPTIONS)
            secret = hidden and not equals
            arguments[at] = f"{name}=***" if hidden and equals else argument
        elif secret:
            arguments[at] = "***"
    return provenance.command_line(arguments, repository) if arguments else None


def _container(port: int) -> dict[str, Any] | None:
    """What Docker knows of the container that publishes the port."""
    named = _docker("ps", "--quiet", "--no-trunc", "--filter", f"publish={port}")
    found = json.loads(_docker("inspect", *named.split()) or "[]") if named else []
    return found[0] if found else None


def _image(container: dict[str, Any]) -> dict[str, Any]:
    known = json.loads(_docker("image", "inspect", container["Image"]) or "[{}]")[0]
    labels = container["Config"].get("Labels") or {}
    return {
        "name": container["Config"]["Image"],
        "id": container["Image"],
        "digests": known.get("RepoDigests") or [],
        "revision": labels.get(REVISION_LABEL),
    }


def _docker(*arguments: str) -> str | None:
    """Docker's answer; None without Docker, or where it does not answer."""
    try:
        done = subprocess.run(
            ["docker", *arguments], capture_output=True, text=True, check=False,
            timeout=DOCKER_S, env=os.environ | {"DOCKER_CLI_HINTS": "false"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
