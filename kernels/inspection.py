"""Look into the built library: what each kernel uses, what it would launch, and what is wrong.

Registers, spills, stack and static shared memory of every kernel and architecture are ptxas' words,
kept by the build. For sm_120a the code itself is read: widths of loads, tensor-core instructions,
local memory. Blocks, threads and dynamic shared memory are those of a dry run; occupancy and waves
are computed from them. Nothing here is measured on a GPU.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kernels import build, dry_run, toolchain
from kernels.dry_run import Launch
from kernels.occupancy import DEVICES, Occupancy, occupancy
from kernels.resources import Compiled, Sass, parse_ptxas, parse_sass
from kernels.toolchain import ToolMissing

TARGET = "sm_120a"
WEIGHT_BITS = 128


@dataclass(frozen=True)
class Kernel:
    """A kernel: what it uses by architecture, its sm_120a code, and its launches on sm_120a."""

    name: str
    compiled: dict[str, Compiled]
    sass: Sass
    launches: dict[str, list[Launch]]  # by architecture

    def dynamic_shared_bytes(self, arch: str) -> int | None:
        """The most that a launch asks for; None where the dry run has none."""
        return max((launch.dynamic_shared_bytes for launch in self.launches[arch]), default=None)

    def occupancy(self, arch: str) -> Occupancy | None:
        """Of the launch with the most shared memory; None where the dry run has none."""
        if (dynamic := self.dynamic_shared_bytes(arch)) is None:
            return None
        compiled = self.compiled[arch]
        shared = compiled.static_shared_bytes + dynamic
        threads = max(launch.threads for launch in self.launches[arch])
        return occupancy(DEVICES[arch], compiled.registers, shared, threads)

    def waves(self, launch: Launch, arch: str) -> float | None:
        """How often a launch fills the device; None where the device cannot run it."""
        resident = self.occupancy(arch)
        if resident is None or not resident.blocks:
            return None
        return launch.blocks / (resident.blocks * DEVICES[arch].multiprocessors)


def problems_of(kernel: Kernel) -> list[str]:
    """Return what a kernel must not do and does, one line each."""
    found = []
    for arch, used in kernel.compiled.items():
        if used.spill_store_bytes or used.spill_load_bytes:
            stores, loads = used.spill_store_bytes, used.spill_load_bytes
            found.append(f"{arch}: spills {stores} bytes and loads {loads} back; none may be")
        elif used.stack_bytes:
            found.append(f"{arch}: has a stack frame of {used.stack_bytes} bytes; none may be")
        resident = kernel.occupancy(arch)
        if resident and resident.blocks == 0:
            found.append(f"{arch}: {DEVICES[arch].name} cannot run it: {resident.limited_by}")
    sass = kernel.sass
    if local := sass.local_loads + sass.local_stores:
        found.append(f"{TARGET}: {local} instructions on local memory; none may be")
    narrow = sum(count for width, count in sass.streaming_loads.items() if width != WEIGHT_BITS)
    if narrow:
        found.append(f"{TARGET}: {narrow} streaming loads are not of 16 bytes")
    if sass.mma and not sass.streaming_loads[WEIGHT_BITS]:
        found.append(f"{TARGET}: multiplies matrices, but streams no weights 16 bytes at a time")
    return [f"{kernel.name}, {line}" for line in found]


def inspect(folder: Path) -> tuple[list[Kernel], dict[str, Any]]:
    """Read the library in a folder; return its kernels, by name, and where the figures come from.

    Raises:
        RuntimeError: not built, stale, without sm_120a code; a tool fails or is missing.
    """
    library = build.library_path(folder)
    stamp = build.read_stamp(folder)
    assert stamp is not None  # library_path has seen it
    if TARGET not in stamp.architectures:
        raise RuntimeError(f"kernels: {library} has no {TARGET} code; run `make kernels`")
    objects = [folder / build.OBJECTS / name for name in stamp.objects]
    if lost := [path for path in objects if not path.exists()]:
        raise RuntimeError(
            f"kernels: {lost[0]}, which {library.name} was linked from, is not there"
        )
    nvcc = toolchain.find_nvcc()
    cuobjdump = toolchain.find_cuobjdump(nvcc.top)

    compiled: dict[tuple[str, str], Compiled] = {}
    for path in objects:
        compiled |= parse_ptxas(path.with_suffix(".ptxas.txt").read_text(encoding="utf-8"))
    sass = parse_sass(_sass(cuobjdump, library))
    with tempfile.TemporaryDirectory() as temporary:
        program = dry_run.compile_dry_run(objects, nvcc, Path(temporary) / "dry_run")
        launches = {arch: dry_run.run(program, DEVICES[arch]) for arch in stamp.architectures}

    mangled = sorted({name for name, _ in compiled})
    if mangled != sorted(sass):
        raise RuntimeError("kernels: ptxas and cuobjdump do not name the same kernels")
    kernels = [
        Kernel(
            name=short,
            compiled={arch: compiled[name, arch] for arch in stamp.architectures},
            sass=sass[name],
            launches={
                arch: [launch for launch in of_arch if launch.kernel == name]
                for arch, of_arch in launches.items()
            },
        )
        for name, short in zip(mangled, _short_names(mangled), strict=True)
    ]
    provenance = {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(changes) if (changes := _git("status", "--porcelain")) is not None else None,
        "sources_sha256": stamp.sources_sha256,
        "nvcc": stamp.nvcc,
        "cuobjdump": toolchain.version_of(cuobjdump),
        "architectures": stamp.architectures,
        "flags": stamp.flags,
        "library_bytes": library.stat().st_size,
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return sorted(kernels, key=lambda kernel: kernel.name), provenance


def _sass(cuobjdump: Path, library: Path) -> str:
    # cuobjdump looks for nvdisasm on PATH.
    path = os.pathsep.join([str(cuobjdump.resolve().parent), os.environ.get("PATH", "")])
    command = [cuobjdump, "-arch", TARGET, "-sass", library]
    return _output("cuobjdump -sass", command, env={**os.environ, "PATH": path})


def _short_names(mangled: list[str]) -> list[str]:
    """Demangle: without parameters, our namespace and the ones of files."""
    text = _output("c++filt", ["c++filt", "-p"], stdin="\n".join(mangled) + "\n")
    names = [line.removeprefix("void ") for line in text.splitlines()]
    return [name.replace("(anonymous namespace)::", "").replace("dsv4::", "") for name in names]


def _output(
    what: str,
    command: list[str | Path],
    stdin: str | None = None,
    env: dict[str, str] | None = None,
) -> str:
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, env=env
        )
    except FileNotFoundError as error:
        raise ToolMissing(f"{what} is not installed") from error
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise RuntimeError(f"kernels: {what} failed: {reason[-1]}")
    return done.stdout


def _git(*arguments: str) -> str | None:
    try:
        return _output("git", ["git", "-C", str(build.ROOT), *arguments]).strip()
    except RuntimeError:
        return None
