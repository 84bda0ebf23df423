"""The CUDA compiler and disassembler: found on this machine, or installed from PyPI into `.cache`.

nvcc is the one that the environment variable NVCC names, else the one on PATH, else what
`requirements/nvcc.txt` locks. cuobjdump is the one on PATH, else one beside nvcc, else what
`requirements/cuobjdump.txt` locks. Locked packages go into an environment of their own, named by
the hash of the file that locks them: no other environment changes, and a new pin is a new folder.
Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
NVCC_ENV = "NVCC"
# The first that compiles for sm_120a.
OLDEST_NVCC = (12, 8)
SIZES = {"nvcc": "104 MB", "cuobjdump": "5 MB"}


class ToolMissing(RuntimeError):
    """There is no such tool, or none that is new enough.

    The message is one line: `reason`, then what would help.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"kernels: {reason}; {remedy}" if remedy else f"kernels: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: its path, `13.0.88`, and the folder that holds its bin and include."""

    path: Path
    version: str
    top: Path


def find_nvcc(cache: Path = CACHE) -> Nvcc:
    """Find a compiler that knows sm_120a.

    Raises:
        ToolMissing: NVCC names none that runs and is new enough; or it is not set, and there is
            none on PATH and none installed.
    """
    if named := os.environ.get(NVCC_ENV):
        nvcc = _ask(Path(named))
        if _too_old(nvcc):
            raise ToolMissing(f"{NVCC_ENV}={named} is {nvcc.version}; {_RULE}")
        return nvcc
    seen = "there is no nvcc on PATH"
    if on_path := shutil.which("nvcc"):
        nvcc = _ask(Path(on_path))
        if not _too_old(nvcc):
            return nvcc
        seen = f"{on_path} is {nvcc.version}"
    if (installed := _packages("nvcc", cache) / "bin" / "nvcc").exists():
        return _ask(installed)
    raise ToolMissing(f"{seen}; {_RULE}", f"set {NVCC_ENV}, or run `make kernels`")


def find_cuobjdump(nvcc_top: Path | None = None, cache: Path = CACHE) -> Path:
    """Find a disassembler whose nvdisasm is on PATH or beside it.

    Raises:
        ToolMissing: none on PATH, in `nvcc_top`/bin or installed.
    """
    candidates = [Path(found)] if (found := shutil.which("cuobjdump")) else []
    candidates += [nvcc_top / "bin" / "cuobjdump"] if nvcc_top else []
    candidates += [_packages("cuobjdump", cache) / "bin" / "cuobjdump"]
    for path in candidates:
        beside = path.resolve().parent / "nvdisasm"
        if path.exists() and (beside.exists() or shutil.which("nvdisasm")):
            return path
    raise ToolMissing("no cuobjdump with nvdisasm is on PATH", "run `make kernels-report`")


def install(tool: str, cache: Path = CACHE) -> None:
    """Install the packages that `requirements/TOOL.txt` locks, hashes checked.

    Raises:
        ToolMissing: the environment cannot be made, or the packages cannot be had.
    """
    requirements = _requirements(tool)
    folder = _folder(tool, cache)
    print(f"  installing {requirements.name} ({SIZES[tool]}) ...", flush=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pip = [partial / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
    pip += ["--only-binary=:all:", "--require-hashes", "-r", requirements]
    for what, command in (
        ("python3 -m venv (is python3-venv installed?)", [sys.executable, "-m", "venv", partial]),
        (f"installing requirements/{requirements.name}", pip),
    ):
        done = _run(command)
        if done.returncode:
            reason = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            raise ToolMissing(f"{what} failed: {reason[-1]}")
    # The tools are not tied to their place, so that the folder is there whole or not at all.
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def version_of(tool: Path) -> str:
    """Return the version of a CUDA tool, for example `13.0.88`.

    Raises:
        ToolMissing: it does not run or does not tell.
    """
    try:
        done = _run([tool, "--version"])
    except OSError as error:
        raise ToolMissing(f"{tool} --version: {error.strerror}") from error
    found = re.search(r"\bV(\d+\.\d+\.\d+)", done.stdout)
    if done.returncode or not found:
        raise ToolMissing(f"{tool} --version gives no version (exit {done.returncode})")
    return found[1]


_RULE = f"sm_120a needs nvcc {'.'.join(map(str, OLDEST_NVCC))} or newer"


def _ask(path: Path) -> Nvcc:
    version = version_of(path)
    # What is on PATH may be a script or a link: the compiler itself says where it is.
    done = _run([path, "--dryrun", "-c", "-x", "cu", os.devnull])
    if not (found := re.search(r"^#\$ _HERE_=(.+)$", done.stderr, re.MULTILINE)):
        raise ToolMissing(f"{path} --dryrun does not name its folder")
    return Nvcc(path, version, Path(found[1]).parent)


def _too_old(nvcc: Nvcc) -> bool:
    return tuple(map(int, nvcc.version.split(".")[:2])) < OLDEST_NVCC


def _requirements(tool: str) -> Path:
    return ROOT / "requirements" / f"{tool}.txt"


def _folder(tool: str, cache: Path) -> Path:
    return cache / f"{tool}-{hashlib.sha256(_requirements(tool).read_bytes()).hexdigest()[:12]}"


def _packages(tool: str, cache: Path) -> Path:
    """Where the packages of an installed tool lie; a path that does not exist before."""
    found = sorted(_folder(tool, cache).glob("lib/python3.*/site-packages/nvidia/cu13"))
    return found[0] if found else _folder(tool, cache) / "absent"


def _run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)
