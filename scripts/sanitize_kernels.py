"""Run compute-sanitizer's tools over every operator of `kernels/ops.py`.

    python scripts/sanitize_kernels.py [--out JSON] [--tools memcheck racecheck ..]

memcheck, racecheck, initcheck and synccheck each watch `scripts/sanitize_driver.py` in a process of
their own. Each tool also gets a driver with a planted fault: if it does not report it, its silence
over our kernels proves nothing. The faults of racecheck and synccheck are kernels that nvcc
compiles here; without nvcc they are not run, and the result says so.

Exit status 1: a tool reports anything, a case did not run or is wrong, or a planted fault is not
reported. Needs a GPU, our library built, and compute-sanitizer (part of the CUDA toolkit).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from kernels import build, toolchain  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SCHEMA_VERSION = 1
OUR_KERNELS = "kns=dsv4"  # a part of the mangled names: all of ours are in this namespace
ERROR_EXIT = 86
NO_CACHING = "PYTORCH_NO_CUDA_MEMORY_CACHING"
# Beyond each allocation lies this much that is nobody's: it may not run on into a neighbour.
PADDING_BYTES = 4096
# Per tool: what is planted, the driver's word for it, whether it is a kernel of its own.
CONTROLS = {
    "memcheck": ("an output that is too short", "short-output", False),
    "racecheck": ("a read of shared memory that races a write", "race", True),
    "initcheck": ("activations that nothing was written to", "unwritten-input", False),
    "synccheck": ("a barrier that half of a warp skips", "barrier", True),
}
# `dsv4` in the names, for the filter that selects our own kernels.
PLANTED = r"""
#include <cuda_runtime.h>
__global__ void dsv4_planted_race(int* out) {
  __shared__ int values[128];
  values[threadIdx.x] = out[threadIdx.x] + threadIdx.x;
  out[threadIdx.x] = values[threadIdx.x ^ 64];  // another warp's, without a barrier
}
__global__ void dsv4_planted_barrier(int* out) {
  if (threadIdx.x % 2) __syncthreads();
  out[threadIdx.x] = threadIdx.x;
}
extern "C" int planted_race(int* out) {
  dsv4_planted_race<<<1, 128>>>(out);
  return cudaGetLastError();
}
extern "C" int planted_barrier(int* out) {
  dsv4_planted_barrier<<<1, 128>>>(out);
  return cudaGetLastError();
}
"""
# Another line with the same beginning says how many were not printed.
_SUMMARY = re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?\s*$", re.MULTILINE)
_RACES = re.compile(r"^=+ RACECHECK SUMMARY: (\d+) hazard", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """One tool over one driver.

    Attributes:
        errors: what the tool counted; None where it came to no summary.
        exit_status: of the tool; None after a timeout.
        lines: the driver's JSON.
        report: the beginning of what the tool reports.
    """

    tool: str
    errors: int | None
    exit_status: int | None
    seconds: float
    lines: tuple[dict[str, Any], ...]
    report: tuple[str, ...]


def count_errors(log: str) -> int | None:
    """Errors, or hazards, that a tool's log sums up; None without a summary."""
    found = _SUMMARY.findall(log) + _RACES.findall(log)
    return sum(map(int, found)) if found else None


def find_sanitizer(given: Path | None) -> Path:
    """compute-sanitizer: the one named, on PATH, or in the toolkit that nvcc belongs to.

    Raises:
        RuntimeError: there is none.
    """
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parent / "compute-sanitizer" if nvcc else None
    on_path = shutil.which("compute-sanitizer")
    for path in (given, Path(on_path) if on_path else None, beside):
        if path is not None and path.is_file():
            return path
    raise RuntimeError(f"sanitize: {given or 'compute-sanitizer'}: not found; it is part of CUDA")


def command(sanitizer: Path, tool: str, log: Path, driver: list[str]) -> list[str]:
    """The command line of one tool over one driver."""
    options = ["--tool", tool, "--kernel-name", OUR_KERNELS, "--error-exitcode", str(ERROR_EXIT)]
    options += ["--log-file", str(log), "--print-limit", "20", "--show-backtrace", "device"]
    options += ["--target-processes", "application-only", "--launch-timeout", "0"]
    # PyTorch probes; of our own calls `kernels/ops.py` raises each error.
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    if tool == "memcheck":
        options += ["--padding", str(PADDING_BYTES)]
    python = [sys.executable, "-m", "scripts.sanitize_driver"]
    return [str(sanitizer), *options, *python, *driver]


def run_tool(sanitizer: Path, tool: str, driver: list[str], folder: Path, timeout_s: float) -> Run:
    """Run one tool over one driver; at the timeout it and the driver are ended."""
    log = folder / f"{tool}-{driver[0]}.log"
    log.touch()
    start = time.monotonic()
    process = subprocess.Popen(
        command(sanitizer, tool, log, driver),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, NO_CACHING: "1"},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = None
    text = log.read_text(encoding="utf-8", errors="replace")
    lines, said = [], []
    for line in output.splitlines():
        if line.startswith("{"):
            lines.append(json.loads(line))
        else:
            said.append(line)
    reported = [line for line in text.splitlines() if line.strip("= ")]
    report = (*reported[:40], *said[-15:])
    seconds = time.monotonic() - start
    return Run(tool, count_errors(text), status, seconds, tuple(lines), report)


def judge(run: Run, num_cases: int) -> str | None:
    """What is wrong with a tool's run over our kernels; None if nothing is."""
    if run.exit_status is None:
        return f"{run.tool}: not done after {run.seconds:.0f} s"
    if run.errors is None:
        return f"{run.tool}: no summary, exit status {run.exit_status}"
    if run.errors:
        return f"{run.tool}: {run.errors} errors"
    done = sum("error" in line for line in run.lines)
    if done != num_cases or run.exit_status:
        return f"{run.tool}: {done} of {num_cases} cases, exit status {run.exit_status}"
    return None


def judge_control(run: Run) -> str | None:
    """What is wrong with a tool's run over its planted fault; None if it reported it."""
    if not run.errors:
        shown = "no summary" if run.errors is None else "no error"
        return (
            f"{run.tool}: {CONTROLS[run.tool][0]} was planted, and it reports {shown} "
            f"(exit status {run.exit_status})"
        )
    return None


def compile_planted(folder: Path) -> tuple[Path | None, str | None]:
    """Compile the faulty kernels for the device that is here.

    Returns:
        The library, or None and why not.
    """
    source, library = folder / "planted.cu", folder / "libplanted.so"
    source.write_text(PLANTED, encoding="utf-8")
    try:
        nvcc = toolchain.find_nvcc()
    except toolchain.ToolMissing as error:
        return None, str(error)
    options = ["-arch=native", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
    done = subprocess.run(
        [nvcc.path, *options, f"-L{nvcc.top / 'lib'}", source, "-o", library],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return None, f"nvcc: {(done.stderr or done.stdout).strip().splitlines()[0]}"
    return library, None


def sanitize(
    tools: list[str], sanitizer: Path, num_cases: int, jobs: int, timeout_s: float
) -> dict[str, Any]:
    """Run tools and controls, several at a time.

    Returns:
        The result without its provenance: tools, controls, and what is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="sanitize-") as name:
        folder = Path(name)
        library, reason = compile_planted(folder)
        with ThreadPoolExecutor(jobs) as pool:

            def start(tool: str, driver: list[str]) -> Any:
                return pool.submit(run_tool, sanitizer, tool, driver, folder, timeout_s)

            runs = {tool: start(tool, ["all"]) for tool in tools}
            controls = {}
            for tool in tools:
                _, word, needs_library = CONTROLS[tool]
                if not needs_library:
                    controls[tool] = start(tool, [word])
                elif library is not None:
                    controls[tool] = start(tool, [word, str(library)])
            result: dict[str, Any] = {"tools": {}, "controls": {}, "wrong": []}
            for future in runs.values():
                _keep(result, "tools", future.result(), judge(future.result(), num_cases))
            for tool in tools:
                if tool in controls:
                    run = controls[tool].result()
                    _keep(result, "controls", run, judge_control(run))
                else:
                    result["controls"][tool] = {"not_run": reason}
                result["controls"][tool]["planted"] = CONTROLS[tool][0]
    return result


def _keep(result: dict[str, Any], kind: str, run: Run, wrong: str | None) -> None:
    entry = asdict(run)
    del entry["tool"]
    entry["lines"] = list(run.lines)
    if wrong is None:
        entry["report"] = []  # a planted fault's report is no news
    else:
        entry["report"] = list(run.report)
        result["wrong"].append(wrong)
    result[kind][run.tool] = entry


def provenance(result: dict[str, Any], sanitizer: Path, commit: str | None) -> dict[str, Any]:
    """Where the result comes from; the device is what the drivers said."""
    git = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False)
    numbers = re.findall(r"Version (\S+)", version.stdout)
    lines = [line for entry in result["tools"].values() for line in entry["lines"]]
    device = next((line for line in lines if "device" in line), {})
    return {
        "commit": git.stdout.strip() or commit,
        "kernel_sources_sha256": build.sources_sha256(),
        "compute_sanitizer": numbers[0] if numbers else None,
        **device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def summary(result: dict[str, Any]) -> str:
    """A line per tool, then what is wrong."""
    lines = []
    for tool, entry in result["tools"].items():
        done = sum("error" in line for line in entry["lines"])
        control = result["controls"][tool]
        found = control.get("errors")
        told = f"not run: {control['not_run']}" if "not_run" in control else f"{found} reported"
        lines.append(
            f"{tool:<10} {entry['errors']} errors in {done} cases, {entry['seconds']:.0f} s; "
            f"planted, {control['planted']}: {told}"
        )
    for kind in ("tools", "controls"):
        for tool, entry in result[kind].items():
            lines += [f"  {tool}: {line}" for line in entry.get("report", ())]
    return "\n".join(lines + result["wrong"])


def main(argv: list[str] | None = None) -> int:
    """Run and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="sanitize_kernels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, metavar="JSON")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--sanitizer", type=Path, help="default: on PATH or beside nvcc")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time")
    parser.add_argument("--timeout-s", type=float, default=100.0, help="of each process")
    parser.add_argument("--commit", help="recorded where this is no git checkout")
    options = parser.parse_args(argv)
    start = time.monotonic()
    try:
        build.library_path()
        sanitizer = find_sanitizer(options.sanitizer)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    from scripts.sanitize_driver import NUM_CASES

    result = sanitize(options.tools, sanitizer, NUM_CASES, options.jobs, options.timeout_s)
    result = {
        "schema_version": SCHEMA_VERSION,
        "provenance": provenance(result, sanitizer, options.commit),
        "seconds": time.monotonic() - start,
        **result,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        temporary.replace(options.out)
    print(summary(result))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
