"""What a compiled kernel uses, as ptxas and cuobjdump tell it: text in, numbers out."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_NARROW = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of a kernel for one architecture."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_shared_bytes: int


@dataclass
class Sass:
    """Instructions of a kernel, counted as they stand in its code. Loads are by width in bits."""

    instructions: int = 0
    mma: int = 0
    ldmatrix: int = 0
    global_loads: Counter[int] = field(default_factory=Counter)
    # Of those, the ones that pass L1 by (no_allocate): what is read once, weights and scales.
    streaming_loads: Counter[int] = field(default_factory=Counter)
    async_copies: Counter[int] = field(default_factory=Counter)
    local_loads: int = 0
    local_stores: int = 0


def parse_ptxas(text: str) -> dict[tuple[str, str], Compiled]:
    """Read what `ptxas -v` printed for a file.

    Returns:
        By (mangled name of the kernel, architecture).
    Raises:
        ValueError: a kernel without its registers or frame: the format is not the known one.
    """
    kernels: dict[tuple[str, str], Compiled] = {}
    key: tuple[str, str] | None = None
    frame: tuple[int, int, int] | None = None
    of_kernel = False
    for line in text.splitlines():
        if found := _ENTRY.search(line):
            if key:
                raise ValueError(f"ptxas output: no registers of {key[0]} for {key[1]}")
            key, frame = (found[1], found[2]), None
        elif found := _PROPERTIES.search(line):
            of_kernel = key is not None and found[1] == key[0]  # not a function that it calls
        elif (found := _FRAME.search(line)) and of_kernel:
            frame = (int(found[1]), int(found[2]), int(found[3]))
        elif (found := _REGISTERS.search(line)) and key:
            if frame is None:
                raise ValueError(f"ptxas output: no stack frame of {key[0]} for {key[1]}")
            shared = _SHARED.search(line)
            kernels[key] = Compiled(int(found[1]), *frame, int(shared[1]) if shared else 0)
            key = None
    if key:
        raise ValueError(f"ptxas output: no registers of {key[0]} for {key[1]}")
    return kernels


def parse_sass(text: str) -> dict[str, Sass]:
    """Read what `cuobjdump -sass` printed; by mangled name of the kernel."""
    kernels: dict[str, Sass] = {}
    sass = Sass()
    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            sass = kernels.setdefault(found[1], Sass())
        elif found := _INSTRUCTION.match(line):
            _count(sass, found[1])
    return kernels


def _count(sass: Sass, instruction: str) -> None:
    name, *modifiers = instruction.split(".")
    sass.instructions += 1
    if name == "LDG":
        sass.global_loads[_width(modifiers)] += 1
        if "NA" in modifiers:
            sass.streaming_loads[_width(modifiers)] += 1
    elif name == "LDGSTS":
        sass.async_copies[_width(modifiers)] += 1
    elif name == "LDL":
        sass.local_loads += 1
    elif name == "STL":
        sass.local_stores += 1
    elif name == "LDSM":
        sass.ldmatrix += 1
    elif name.endswith("MMA"):  # HMMA, IMMA, ...; fused multiply-adds end in FMA
        sass.mma += 1


def _width(modifiers: list[str]) -> int:
    widths = [int(m) for m in modifiers if m in ("64", "128", "256")]
    widths += [_NARROW[m] for m in modifiers if m in _NARROW]
    return widths[0] if widths else 32
