"""Builds `emulated_links.cpp`: the functions of allreduce.h, run by host threads."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kernels import build

SOURCE = Path(__file__).with_suffix(".cpp")


def build_emulation(folder: Path) -> Path:
    """Compile it into `folder`, from the sources that are there; skip without g++."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    library = folder / "libemulated_links.so"
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread"]
    command += [f"-I{build.CSRC}", str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    return library
