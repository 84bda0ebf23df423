"""The Docker client: found, called, its failures as one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

CLIENT_ENV = "DOCKER"


class DockerError(RuntimeError):
    """No client, no engine, or a command that failed; the message is the one line to print."""


def client() -> str:
    """The docker command: what DOCKER names, else the one on PATH.

    Raises:
        DockerError: there is none.
    """
    named = os.environ.get(CLIENT_ENV)
    if found := shutil.which(named or "docker"):
        return found
    raise DockerError(f"docker: there is no {named or 'docker'} on PATH; install Docker")


def compose() -> list[str]:
    """Compose as a plugin of docker, else as `docker-compose`.

    Raises:
        DockerError: there is neither.
    """
    docker = client()
    if _call([docker, "compose", "version"]).returncode == 0:
        return [docker, "compose"]
    if found := shutil.which("docker-compose"):
        return [found]
    raise DockerError("docker: neither `docker compose` nor docker-compose is installed")


def ask(*arguments: str) -> str:
    """Run the client and return its standard output.

    Raises:
        DockerError: with the last line of what it said.
    """
    done = _call([client(), *arguments])
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise DockerError(f"docker {arguments[0]}: {said}")
    return done.stdout


def inspect(image: str) -> dict[str, Any] | None:
    """What the engine knows of an image that it has; None where it has none of that name."""
    done = _call([client(), "image", "inspect", image])
    if done.returncode == 0:
        return json.loads(done.stdout)[0]
    if "No such image" in done.stderr:
        return None
    raise DockerError(f"docker image inspect {image}: {done.stderr.strip()}")


def last_line(container: str) -> str:
    """The newest line that a container wrote, on either stream."""
    done = _call([client(), "logs", "--tail", "1", container])
    return (done.stdout + done.stderr).strip() or "no message"


def _call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
