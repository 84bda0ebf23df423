#!/usr/bin/env python3
"""Which GPU architectures each shared library holds code for, as `cuobjdump --list-elf` counts.

    python scripts/list_architectures.py --out results/architectures-NAME WHEEL_OR_LIBRARY...

Reads the fatbin containers in `.nv_fatbin` and `__nv_relfatbin` itself, so no CUDA tool is needed;
compressed entries name their architecture in the clear. Writes OUT.json and OUT.md. A library with
no container compiles at run time, or holds no GPU code. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SCHEMA_VERSION = 1
SECTIONS = (b".nv_fatbin", b"__nv_relfatbin")
MAGIC = 0xBA55ED50
CONTAINER = struct.Struct("<IHHQ")  # magic, version, header size, bytes that follow
# kind, version, header size, payload size, 12 bytes, architecture, 8 bytes, flags
ENTRY = struct.Struct("<HHIQ12xI8xQ")
KINDS = {1: "PTX", 2: "ELF"}
# Found by compiling for sm_90, sm_90a, sm_100f, sm_120 and sm_120a with CUDA 13.0.
ARCHITECTURE_SPECIFIC = 0x0010_0000  # the "a" of sm_120a: runs on that one only
FAMILY_SPECIFIC = 0x0020_0000  # the "f" of sm_100f
ELF_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian


@dataclass(frozen=True)
class Library:
    """Numbers of compiled images (ELF) and of PTX texts, by architecture."""

    name: str
    num_bytes: int
    elf: Counter[str] = field(default_factory=Counter)
    ptx: Counter[str] = field(default_factory=Counter)


def sections(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, contents) of each section of an ELF file.

    Raises:
        ValueError: not a 64-bit little-endian ELF file.
    """
    if data[:6] != ELF_MAGIC:
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names_index = struct.unpack_from("<HHH", data, 58)
    headers = [
        # name, 20 bytes, offset, size
        struct.unpack_from("<I20xQQ", data, table + index * size)
        for index in range(count)
    ]
    if not headers:
        return
    _, names, names_size = headers[names_index]
    strings = data[names : names + names_size]
    for name, offset, length in headers:
        yield strings[name : strings.index(b"\0", name)], data[offset : offset + length]


def entries(section: bytes) -> Iterator[tuple[str, str]]:
    """(kind, architecture) of each entry of the containers in a section.

    Raises:
        ValueError: a container or an entry that is cut short.
    """
    start = 0
    while start + CONTAINER.size <= len(section):
        magic, _, header, length = CONTAINER.unpack_from(section, start)
        if magic != MAGIC:
            start += 8  # padding between containers
            continue
        entry, end = start + header, start + header + length
        if end > len(section):
            raise ValueError(f"fatbin container at {start} ends beyond its section")
        while entry < end:
            kind, _, entry_header, payload, number, flags = ENTRY.unpack_from(section, entry)
            if kind not in KINDS:
                raise ValueError(f"fatbin entry at {entry} has kind {kind}; 1 and 2 are known")
            suffix = "a" * bool(flags & ARCHITECTURE_SPECIFIC) + "f" * bool(flags & FAMILY_SPECIFIC)
            yield KINDS[kind], f"sm_{number}{suffix}"
            entry += entry_header + payload
        start = end


def read_library(name: str, data: bytes) -> Library:
    """Architectures of one shared library."""
    library = Library(name, len(data))
    for section, contents in sections(data):
        if section in SECTIONS:
            for kind, architecture in entries(contents):
                (library.elf if kind == "ELF" else library.ptx)[architecture] += 1
    return library


def read_libraries(path: Path) -> Iterator[Library]:
    """The shared libraries of a wheel, or one shared library."""
    if path.suffix != ".whl":
        yield read_library(path.name, path.read_bytes())
        return
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(".so"):
                yield read_library(name, wheel.read(name))


def by_number(architecture: str) -> tuple[int, str]:
    """Sort key: sm_90 before sm_90a before sm_100."""
    digits = "".join(c for c in architecture if c.isdigit())
    return int(digits), architecture


def render(libraries: list[Library], sources: dict[str, str]) -> str:
    """The table, as Markdown."""
    columns = sorted({name for library in libraries for name in library.elf}, key=by_number)
    lines = [
        "# GPU code in the shared libraries",
        "",
        "Compiled images by architecture (`cuobjdump` counts sm_120f as sm_120), and the",
        "architectures of the PTX that a driver can compile for newer cards. Made by",
        "`scripts/list_architectures.py` from",
        *(f"`{name}` (sha256 `{digest[:16]}`)" for name, digest in sources.items()),
        "",
        "| library | MB | " + " | ".join(columns) + " | PTX |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for library in libraries:
        counts = [str(library.elf[name] or "-") for name in columns]
        ptx = ", ".join(
            f"{name} x {library.ptx[name]}" for name in sorted(library.ptx, key=by_number)
        )
        cells = [f"`{library.name}`", f"{library.num_bytes / 1e6:.1f}", *counts, ptx or "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="list_architectures", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="without a suffix")
    parser.add_argument("paths", type=Path, nargs="+", metavar="WHEEL_OR_LIBRARY")
    args = parser.parse_args(argv)
    try:
        libraries = [library for path in args.paths for library in read_libraries(path)]
        sources = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in args.paths}
    except (OSError, ValueError, struct.error, zipfile.BadZipFile) as error:
        print(f"list_architectures: {error}", file=sys.stderr)
        return 2
    body = {
        "schema_version": SCHEMA_VERSION,
        "sources": sources,
        "libraries": [
            {"name": lib.name, "num_bytes": lib.num_bytes, "elf": lib.elf, "ptx": lib.ptx}
            for lib in libraries
        ],
    }
    text = render(libraries, sources)
    Path(f"{args.out}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    Path(f"{args.out}.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
