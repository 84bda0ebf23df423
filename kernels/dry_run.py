"""Which launches the library would make, seen without a GPU.

`dry_run.cpp` stands in for the CUDA runtime and runs the library's host code on sizes of
DeepSeek-V4-Flash: what comes out are the real grids, blocks and shared memory. Nothing is computed.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kernels.occupancy import Device
from kernels.toolchain import Nvcc

SOURCE = Path(__file__).with_suffix(".cpp")


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a case such as `moe M=2 TP2`."""

    number: int  # in the order of the dry run
    case: str
    kernel: str  # mangled
    grid: tuple[int, int, int]
    threads: int  # of a block
    dynamic_shared_bytes: int
    dependent: bool  # may start before the kernel before it has ended

    @property
    def blocks(self) -> int:
        """Blocks in the grid."""
        x, y, z = self.grid
        return x * y * z


def compile_dry_run(objects: list[Path], nvcc: Nvcc, program: Path) -> Path:
    """Link the library's objects with the stand-in; return the program.

    Raises:
        RuntimeError: it does not compile or link: most likely the library calls a function of the
            runtime that the stand-in lacks.
    """
    command = [nvcc.path, "-std=c++17", "-nodlink", "-cudart", "none", SOURCE, *objects]
    done = subprocess.run([*command, "-o", program], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
        errors = [line for line in lines if "error" in line or "undefined reference" in line]
        raise RuntimeError(f"kernels: {SOURCE.name} does not link: {(errors or lines)[0].strip()}")
    return program


def run(program: Path, device: Device) -> list[Launch]:
    """Return the launches that the library makes on a device, in order.

    Raises:
        RuntimeError: a function of the library refused its arguments, or the device would refuse
            what it launches.
    """
    major, minor = device.capability
    numbers = (device.multiprocessors, major, minor, device.shared_bytes_per_block)
    done = subprocess.run(
        [program, *map(str, numbers)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise RuntimeError(f"kernels: dry run for {device.name}: {reason[0]}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        Launch(number, **{**row, "grid": tuple(row["grid"])}) for number, row in enumerate(rows)
    ]
