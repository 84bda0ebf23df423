"""Compile `kernels/csrc` into one shared library, with nvcc alone.

    python -m kernels.build [--arch sm_80 sm_90 sm_120a] [--jobs 2] [--install]

Steps: compare with what is there -> find nvcc -> compile each file that changed -> link -> put the
library in its place, then a stamp beside it. The library is `libdsv4_kernels.so`; its folder is
`build/kernels`, or the one that the environment variable DSV4_KERNELS_DIR names. Objects stay in
`objects`, named by the hash of what they were made from; so does what ptxas said of each kernel,
for `kernels/report.py`. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from kernels import toolchain
from kernels.folder_lock import FolderHeld, FolderLock
from kernels.toolchain import Nvcc, ToolMissing

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "kernels" / "csrc"
FOLDER_ENV = "DSV4_KERNELS_DIR"
LIBRARY = "libdsv4_kernels.so"
STAMP = "libdsv4_kernels.json"
OBJECTS = "objects"
ARCHITECTURES = ("sm_80", "sm_90", "sm_120a")
SCHEMA_VERSION = 1

COMPILE = ("-O3", "-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-fPIC", "-Xptxas", "-v")
# A runtime of its own, none of whose names another library can see or replace: it loads beside any
# torch, and needs the C library only. No device linking: no kernel calls into another file.
LINK = ("-shared", "-nodlink", "-cudart", "static")
LINK += ("-Xcompiler", "-static-libstdc++,-static-libgcc", "-Xlinker", "--no-undefined")
EXPORTS = "{ global: dsv4_*; local: *; };\n"


@dataclass(frozen=True)
class BuildConfig:
    """What to build, from where, to where.

    Raises:
        ValueError: no architecture or an unknown one; fewer than one job.
    """

    folder: Path
    csrc: Path = CSRC
    architectures: tuple[str, ...] = ARCHITECTURES
    jobs: int = 1

    def __post_init__(self) -> None:
        wrong = sorted(set(self.architectures) - set(ARCHITECTURES))
        if wrong or not self.architectures:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"architectures = {self.architectures}; there are {known}")
        if self.jobs < 1:
            raise ValueError(f"jobs = {self.jobs}; at least 1 is needed")
        in_order = tuple(name for name in ARCHITECTURES if name in self.architectures)
        object.__setattr__(self, "architectures", in_order)


@dataclass(frozen=True)
class Stamp:
    """What a library was made from; written beside it, as JSON, once it is in its place."""

    sources_sha256: str
    architectures: tuple[str, ...]
    nvcc: str  # its version
    flags: tuple[str, ...]
    objects: tuple[str, ...]  # file names in OBJECTS
    schema_version: int = SCHEMA_VERSION


class BuildError(RuntimeError):
    """A file does not compile, or the objects do not link; the message is one line."""


def library_folder() -> Path:
    """Return the folder of the library: DSV4_KERNELS_DIR, else `build/kernels`."""
    named = os.environ.get(FOLDER_ENV)
    return Path(named) if named else ROOT / "build" / "kernels"


def library_path(folder: Path | None = None, csrc: Path = CSRC) -> Path:
    """Return the library, after making sure that it was built from the sources that are there.

    Raises:
        RuntimeError: it is not built, or it was built from other sources or with other flags.
    """
    folder = folder or library_folder()
    stamp = read_stamp(folder)
    if stamp is None:
        raise RuntimeError(f"kernels: {folder / LIBRARY} is not built; run `make kernels`")
    if stamp.sources_sha256 != sources_sha256(csrc):
        raise RuntimeError(
            f"kernels: {folder / LIBRARY} is stale: it was built from other sources than {csrc} "
            "holds; run `make kernels`"
        )
    return folder / LIBRARY


def read_stamp(folder: Path) -> Stamp | None:
    """Return the stamp of the library in a folder; None where library or stamp is missing."""
    path = folder / STAMP
    if not (path.exists() and (folder / LIBRARY).exists()):
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.pop("schema_version") != SCHEMA_VERSION:
        return None
    return Stamp(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def sources_sha256(csrc: Path = CSRC) -> str:
    """Hash the flags, then every source and header by name and content."""
    digest = hashlib.sha256("\0".join((*COMPILE, *LINK, EXPORTS)).encode())
    for path in _headers(csrc) + _sources(csrc):
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def build(config: BuildConfig, install: bool = False) -> Path:
    """Build the library unless it is there, made from these sources for these architectures.

    Args:
        install: where there is no compiler, install the one that is locked.
    Raises:
        BuildError: a file does not compile or the link fails; the library that was there stays.
        ToolMissing: no compiler.
        FolderHeld: another process builds in this folder.
    """
    start = time.monotonic()
    config.folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(config.folder, "building the kernels", "build.lock")
    try:
        wanted = sources_sha256(config.csrc)
        stamp = read_stamp(config.folder)
        library = config.folder / LIBRARY
        if stamp and (stamp.sources_sha256, stamp.architectures) == (wanted, config.architectures):
            print(f"kernels: {library} is up to date")
            return library
        nvcc = _compiler(install)
        print(f"kernels: nvcc {nvcc.version}, {', '.join(config.architectures)}", flush=True)
        objects = _compile_all(config, nvcc)
        names = tuple(path.name for path in objects)
        flags = COMPILE + LINK
        new = Stamp(wanted, config.architectures, nvcc.version, flags, names)
        _put_in_place(config.folder, _link(config.folder, objects, nvcc), new)
        size = library.stat().st_size / 1e6
        print(f"kernels: {library}, {size:.1f} MB, in {time.monotonic() - start:.0f} s")
        return library
    finally:
        lock.release()


def _compiler(install: bool) -> Nvcc:
    if not (os.environ.get("NVCC_CCBIN") or shutil.which("g++")):
        raise ToolMissing("nvcc needs g++, and there is none on PATH")
    try:
        return toolchain.find_nvcc()
    except ToolMissing as error:
        if not install or os.environ.get(toolchain.NVCC_ENV):
            raise
        print(f"kernels: {error.reason}", flush=True)
    toolchain.install("nvcc")
    return toolchain.find_nvcc()


def _compile_all(config: BuildConfig, nvcc: Nvcc) -> list[Path]:
    """Compile what has no object yet, the largest file first; return the objects, by name."""
    sources = sorted(_sources(config.csrc), key=lambda path: -path.stat().st_size)
    if not sources:
        raise BuildError(f"kernels: there is no *.cu in {config.csrc}")
    (config.folder / OBJECTS).mkdir(exist_ok=True)
    threads = max(1, config.jobs // len(sources))
    objects = {source: _object(config, nvcc, source) for source in sources}
    todo = [source for source in sources if not objects[source].exists()]
    if len(todo) < len(sources):
        print(f"  {len(sources) - len(todo)} of {len(sources)} files as before", flush=True)
    with ThreadPoolExecutor(config.jobs) as pool:
        running = [
            pool.submit(_compile, config, nvcc, source, objects[source], threads) for source in todo
        ]
        try:
            for number, done in enumerate(as_completed(running), 1):
                name, seconds = done.result()
                print(f"  [{number}/{len(todo)}] {name} {seconds:.0f} s", flush=True)
        except BuildError:
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(objects.values())


def _object(config: BuildConfig, nvcc: Nvcc, source: Path) -> Path:
    """The object's path; its name changes with everything that can change its content."""
    digest = hashlib.sha256("\0".join((*COMPILE, *config.architectures, nvcc.version)).encode())
    for path in [*_headers(config.csrc), source]:
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return config.folder / OBJECTS / f"{source.stem}-{digest.hexdigest()[:16]}.o"


def _compile(
    config: BuildConfig, nvcc: Nvcc, source: Path, target: Path, threads: int
) -> tuple[str, float]:
    begin = time.monotonic()
    command = [nvcc.path, *COMPILE, "--threads", str(threads)]
    for name in config.architectures:
        command += ["-gencode", f"arch={name.replace('sm', 'compute')},code={name}"]
    partial = target.with_suffix(".partial.o")
    done = _run([*command, "-c", source, "-o", partial])
    log = target.with_suffix(".ptxas.txt")
    log.write_text(done.stderr, encoding="utf-8")
    if done.returncode:
        raise BuildError(f"kernels: {source.name} does not compile: {_first_error(done)} ({log})")
    if _object(config, nvcc, source) != target:
        raise BuildError(f"kernels: {source.name} or a header changed while it compiled; try again")
    partial.replace(target)
    return source.name, time.monotonic() - begin


def _link(folder: Path, objects: list[Path], nvcc: Nvcc) -> Path:
    exports = folder / OBJECTS / "exports.map"
    exports.write_text(EXPORTS, encoding="utf-8")
    partial = folder / f"{LIBRARY}.partial"
    command = [nvcc.path, *LINK, "-Xlinker", f"--version-script={exports}"]
    command += [f"-L{nvcc.top / 'lib'}", *objects]  # where PyPI's packages have libcudart_static.a
    done = _run([*command, "-o", partial])
    if done.returncode:
        raise BuildError(f"kernels: the objects do not link: {_first_error(done)}")
    return partial


def _put_in_place(folder: Path, built: Path, stamp: Stamp) -> None:
    """Replace library and stamp. In between there is no stamp: never that of another library."""
    (folder / STAMP).unlink(missing_ok=True)
    built.replace(folder / LIBRARY)
    partial = folder / f"{STAMP}.partial"
    partial.write_text(json.dumps(asdict(stamp), indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / STAMP)
    kept = {Path(name).stem for name in stamp.objects} | {"exports"}
    for path in (folder / OBJECTS).iterdir():
        if path.name.split(".")[0] not in kept:
            path.unlink()


def _run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _first_error(done: subprocess.CompletedProcess[str]) -> str:
    """The first line that a compiler or linker calls an error, else the last one."""
    lines = (done.stderr + done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
    errors = [line for line in lines if re.search(r"\berror\b|\bfatal\b|undefined reference", line)]
    return (errors or lines[-1:])[0].strip()


def _sources(csrc: Path) -> list[Path]:
    return sorted(csrc.glob("*.cu"))


def _headers(csrc: Path) -> list[Path]:
    return sorted([*csrc.glob("*.cuh"), *csrc.glob("*.h")])


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, build, return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.build", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="default: the cores"
    )
    parser.add_argument(
        "--install", action="store_true", help="install the locked nvcc where there is none"
    )
    arguments = parser.parse_args(argv)
    try:
        config = BuildConfig(
            library_folder(), architectures=tuple(arguments.arch), jobs=arguments.jobs
        )
        build(config, install=arguments.install)
    except ValueError as error:
        parser.error(str(error))
    except FolderHeld as error:
        print(f"kernels: {library_folder()} is held by {error}", file=sys.stderr)
        return 1
    except (BuildError, ToolMissing) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
