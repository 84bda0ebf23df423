"""What the engine loaded, printed once it answers: the load record as one screen.

    python -m serve.summary RECORD --url URL --pid PID --model DIR

`serve run` starts this beside the engine that it becomes. It leaves the foreground at once, prints
when the server is ready and ends; when the engine ends first it ends without a word. The record is
written by `kernels/load_record.py`.
"""

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
POLL_S = 1.0
PARTS = {"target": "target", "draft": "MTP head"}
WIDTH = 100


def render(record: dict[str, Any], model: str) -> str:
    """The record as lines of text."""
    parts = {part: record[part] for part in PARTS if part in record}
    any_part = next(iter(parts.values()), {})
    lines = [f"serve: ready; {model} on {any_part.get('tensor_parallel_size', 0)} rank(s)"]
    for part, label in PARTS.items():
        lines += part_lines(label, parts[part]) if part in parts else [f"  {label:<10}not loaded"]
    reduce = ", ".join(any_part.get("all_reduce", ())) or "none"
    lines.append(f"  {'all-reduce':<12}{reduce}")
    return "\n".join(lines)


def part_lines(label: str, entry: dict[str, Any]) -> list[str]:
    """Counts, attention and each scheme with its kernel and modules, of one model."""
    counts = f"{entry['num_parameters']:,} parameters from {entry['num_tensors']:,} tensors"
    if entry["dequantized"]:
        counts += f", {len(entry['dequantized'])} dequantized from FP8 to BF16"
    attention = ", ".join(f"{name} x {count}" for name, count in entry["attention"].items())
    schemes: dict[tuple[str, str], list[str]] = {}
    for module in entry["modules"]:
        name = module["module"].removeprefix("model.").removeprefix("layers.*.")
        key = (module["scheme"], module["kernel"])
        schemes.setdefault(key, []).append(f"{name} x {module['count']}")
    lines = [f"  {label:<10}{counts}", f"    {'attention':<10}{attention}"]
    for (scheme, kernel), modules in schemes.items():
        lines.append(f"    {scheme}" + (f" with {kernel}" if kernel else ""))
        lines += wrapped(modules)
    return lines


def wrapped(names: list[str]) -> list[str]:
    """Names in indented lines of at most WIDTH columns."""
    lines = [""]
    for name in names:
        if lines[-1] and len(lines[-1]) + len(name) + 8 > WIDTH:
            lines.append("")
        lines[-1] += f", {name}" if lines[-1] else name
    return [f"      {line}" for line in lines]


def summary(path: Path, model: str) -> str:
    """The text to print: the record, or why there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"serve: ready; what was loaded is not known: {path}: {error}"
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        return f"serve: ready; load record {path}: schema_version = {version!r}; must be 1"
    return render(record, model) + f"\n  {'record':<12}{path}"


def is_ready(url: str) -> bool:
    """Whether the server answers /health."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def is_running(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_ready(url: str, pid: int) -> bool:
    """Wait; False when the process ends first."""
    while not is_ready(url):
        if not is_running(pid):
            return False
        time.sleep(POLL_S)
    return True


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns at once in the caller's process."""
    parser = argparse.ArgumentParser(prog="python -m serve.summary")
    parser.add_argument("record", type=Path)
    parser.add_argument("--url", required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--model", required=True)
    arguments = parser.parse_args(argv)
    if os.fork():  # the engine must not be the parent: it would leave a zombie
        return 0
    if wait_until_ready(arguments.url, arguments.pid):
        print(summary(arguments.record, arguments.model), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
