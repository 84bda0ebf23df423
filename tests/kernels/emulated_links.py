"""Builds `emulated_links.cpp`: the functions of allreduce.h, run by host threads."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels import allreduce_abi as abi
from kernels import build

SOURCE = Path(__file__).with_suffix(".cpp")
GONE_S = 60  # longer than any test holds a region


def build_emulation(folder: Path) -> Path:
    """Compile it into `folder`, from the sources that are there; skip without g++."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    library = folder / "libemulated_links.so"
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread"]
    command += [f"-I{build.CSRC}", str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@contextlib.contextmanager
def no_region_left() -> Iterator[None]:
    """What runs within leaves no region in /dev/shm.

    Those that are there already are somebody else's; those of a test that runs beside this one go
    with its end.
    """
    before = set(abi.SHM_FOLDER.glob("dsv4-allreduce-*"))
    yield
    made = set(abi.SHM_FOLDER.glob("dsv4-allreduce-*")) - before
    end = time.monotonic() + GONE_S
    while (left := {path for path in made if path.exists()}) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left
