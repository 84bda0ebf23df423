"""Report what the built kernels use, and fail on what they must not: `python -m kernels.report`.

Prints a table and writes JSON; `kernels/inspection.py` says where the figures come from.

Exit status 1: a kernel spills or has a stack frame, touches local memory in its sm_120a code, reads
weights otherwise than 16 bytes at a time, or cannot run on one of the devices.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernels import build, toolchain
from kernels.inspection import TARGET, WEIGHT_BITS, Kernel, inspect, problems_of
from kernels.occupancy import DEVICES
from kernels.toolchain import ToolMissing

SCHEMA_VERSION = 1
SHOWN_CASES = tuple(f"moe M={m} TP2" for m in (1, 2, 3, 4, 8, 16, 64, 257))
SHOWN_CASES += tuple(f"all-reduce {size} bytes" for size in (8192, 524288))


def as_json(kernels: list[Kernel], provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the report as it is written; launches carry their waves."""
    return {
        "schema_version": SCHEMA_VERSION,
        "provenance": provenance,
        "devices": {arch: asdict(DEVICES[arch]) for arch in provenance["architectures"]},
        "problems": [line for kernel in kernels for line in problems_of(kernel)],
        "kernels": [_kernel_json(kernel) for kernel in kernels],
    }


def table(kernels: list[Kernel], provenance: dict[str, Any]) -> str:
    """Return the report as one screen of text."""
    archs = provenance["architectures"]
    head = ["kernel", "regs " + "/".join(arch.removeprefix("sm_") for arch in archs), "spill"]
    head += ["stack", "shared", "threads", "blk/SM", "warps/SM", "limit", "16B/stream"]
    head += ["16B/loads", "mma", "local"]
    rows = [head, *(_row(kernel, archs) for kernel in kernels)]
    lines = [
        f"nvcc {provenance['nvcc']}, {', '.join(archs)}; occupancy and code: {TARGET}, "
        f"{DEVICES[TARGET].name}, {DEVICES[TARGET].multiprocessors} multiprocessors; not measured"
    ]
    lines += _aligned(rows)
    lines += ["", f"launches on {DEVICES[TARGET].name} (blocks, waves)"]
    lines += _aligned([_case_row(kernels, case) for case in SHOWN_CASES])
    problems = [line for kernel in kernels for line in problems_of(kernel)]
    lines += ["", *(f"PROBLEM {line}" for line in problems)] if problems else []
    return "\n".join(lines)


def _row(kernel: Kernel, archs: tuple[str, ...]) -> list[str]:
    used = [kernel.compiled[arch] for arch in archs]
    dynamic, resident = kernel.dynamic_shared_bytes(TARGET), kernel.occupancy(TARGET)
    threads = {launch.threads for launch in kernel.launches[TARGET]}
    sass = kernel.sass
    static = kernel.compiled[TARGET].static_shared_bytes
    return [
        kernel.name,
        "/".join(str(u.registers) for u in used),
        str(sum(u.spill_store_bytes + u.spill_load_bytes for u in used)),
        str(sum(u.stack_bytes for u in used)),
        f"{static}+{'?' if dynamic is None else dynamic}",
        "/".join(map(str, sorted(threads))) or "?",
        str(resident.blocks) if resident else "?",
        f"{resident.warps}/{DEVICES[TARGET].warps}" if resident else "?",
        resident.limited_by if resident else "not launched",
        f"{sass.streaming_loads[WEIGHT_BITS]}/{sass.streaming_loads.total()}",
        f"{sass.global_loads[WEIGHT_BITS]}/{sass.global_loads.total()}",
        str(sass.mma),
        str(sass.local_loads + sass.local_stores),
    ]


def _case_row(kernels: list[Kernel], case: str) -> list[str]:
    made = [
        (launch.number, kernel, launch)
        for kernel in kernels
        for launch in kernel.launches[TARGET]
        if launch.case == case
    ]
    parts = [
        f"{kernel.name} {launch.blocks} ({waves:.2f})"
        for _, kernel, launch in sorted(made, key=lambda item: item[0])
        if (waves := kernel.waves(launch, TARGET)) is not None
    ]
    return [case, "  ".join(parts) or "none"]


def _kernel_json(kernel: Kernel) -> dict[str, Any]:
    def by_width(counts: dict[int, int]) -> dict[str, int]:
        return {str(width): counts[width] for width in sorted(counts)}

    sass = dict(vars(kernel.sass))  # asdict would break its counters
    for name in ("global_loads", "streaming_loads", "async_copies"):
        sass[f"{name}_by_bits"] = by_width(sass.pop(name))
    return {
        "name": kernel.name,
        "by_architecture": {
            arch: {
                **asdict(compiled),
                "dynamic_shared_bytes": kernel.dynamic_shared_bytes(arch),
                "occupancy": asdict(o) if (o := kernel.occupancy(arch)) else None,
                "launches": [
                    {
                        "case": launch.case,
                        "grid": launch.grid,
                        "threads": launch.threads,
                        "dynamic_shared_bytes": launch.dynamic_shared_bytes,
                        "dependent": launch.dependent,
                        "waves": kernel.waves(launch, arch),
                    }
                    for launch in kernel.launches[arch]
                ],
            }
            for arch, compiled in kernel.compiled.items()
        },
        f"sass_{TARGET}": sass,
    }


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, write and print the report, return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="default: report.json beside the library")
    parser.add_argument(
        "--install", action="store_true", help="install the locked cuobjdump where there is none"
    )
    arguments = parser.parse_args(argv)
    folder = build.library_folder()
    try:
        if arguments.install:
            _install_cuobjdump()
        kernels, provenance = inspect(folder)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    report = as_json(kernels, provenance)
    out = arguments.out or folder / "report.json"
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(out)
    print(table(kernels, provenance))
    return 1 if report["problems"] else 0


def _install_cuobjdump() -> None:
    try:
        toolchain.find_cuobjdump(toolchain.find_nvcc().top)
    except ToolMissing:
        toolchain.install("cuobjdump")


if __name__ == "__main__":
    sys.exit(main())
