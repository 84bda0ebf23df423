"""Build an image: its base by digest, its labels, its layers' sizes, its SBOM.

    python docker/image.py [cpu | gpu | router] [--lock] [--report FILE]

Steps: read the pin -> find the base's digest -> docker build -> table of layers -> SBOM. --report
builds a second time, which shows what a build costs where nothing changed.
A base without a digest in docker/bases.json is pulled by its name, and the digest found is built
from; --lock writes it into the file. IMAGE names the result (dsv4-maxq), DOCKER the client, BASE
another base; DOCKER_BUILD_FLAGS is added to `docker build`, for example
`--secret id=pip,src=pip.conf`. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import engine  # noqa: E402
import sbom  # noqa: E402

from bench.provenance import checkout, cpu_model, series_sha256  # noqa: E402

BASES = HERE / "bases.json"
SBOM_FOLDER = ROOT / "build" / "sbom"
UNRECORDED = "unrecorded"


@dataclass(frozen=True)
class Base:
    """An image to build from. `digest` is None for one that was never in a registry."""

    name: str
    digest: str | None

    @property
    def reference(self) -> str:
        """What FROM is given: the digest decides, the tag only tells people."""
        return f"{self.name.partition('@')[0]}@{self.digest}" if self.digest else self.name


@dataclass(frozen=True)
class Layer:
    """Bytes of a layer as they lie unpacked, and the instruction that made it."""

    size_bytes: int
    instruction: str


def image_name(target: str) -> str:
    """The name and tag of a target's image."""
    return f"{os.environ.get('IMAGE', 'dsv4-maxq')}:{target}"


def find_base(target: str, lock: bool = False) -> Base:
    """The base of a target, by digest where there can be one.

    Raises:
        engine.DockerError: it is neither here nor in a registry that can be reached.
    """
    bases = json.loads(BASES.read_text(encoding="utf-8"))
    other = os.environ.get("BASE")
    name, digest = other or bases[target]["name"], None if other else bases[target]["digest"]
    if digest:
        return Base(name, digest)
    known = None if lock else engine.inspect(name)
    if known is None:
        print(f"image: pulling {name}", flush=True)
        engine.ask("pull", "--quiet", name)
        known = engine.inspect(name)
    assert known is not None
    digests = [entry.partition("@")[2] for entry in known.get("RepoDigests") or ()]
    base = Base(name, digests[0] if digests else None)
    if lock and base.digest:
        for entry in bases.values():
            if entry["name"] == name:
                entry["digest"] = base.digest
        rows = [f' "{key}": {json.dumps(entry)}' for key, entry in bases.items()]
        partial = BASES.with_suffix(".partial")
        partial.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
        partial.replace(BASES)
    elif base.digest:
        print(f"image: {name} is not locked; built from {base.digest}. --lock keeps that")
    return base


def build_arguments(target: str, base: Base) -> dict[str, str]:
    """The values of the Dockerfile's ARGs."""
    pin = json.loads((ROOT / "patches" / "vllm.lock").read_text(encoding="utf-8"))
    source = checkout(ROOT)
    revision = source["commit"] or UNRECORDED
    arguments = {
        "GPU_BASE" if target == "gpu" else "CPU_BASE": base.reference,
        "REVISION": f"{revision}-dirty" if source["dirty"] else revision,
        "VLLM_VERSION": pin["version"],
        "SERIES_SHA256": series_sha256(ROOT / "patches"),
        "BASE_NAME": base.name,
        "BASE_DIGEST": base.digest or UNRECORDED,
    }
    if (index := os.environ.get("TORCH_CPU_INDEX")) is not None:
        arguments["TORCH_CPU_INDEX"] = index
    return arguments


def build(target: str, arguments: dict[str, str]) -> float:
    """Run `docker build`, its output passed on; returns the seconds it took.

    Raises:
        engine.DockerError: it failed.
    """
    command = [engine.client(), "build", "--target", target, "--tag", image_name(target)]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    command += [*shlex.split(os.environ.get("DOCKER_BUILD_FLAGS", "")), str(ROOT)]
    begin = time.monotonic()
    done = subprocess.run(command, env={**os.environ, "DOCKER_BUILDKIT": "1"}, check=False)
    if done.returncode:
        raise engine.DockerError(f"image: building {target} failed (exit {done.returncode})")
    return time.monotonic() - begin


def layers(image: str) -> list[Layer]:
    """The layers of an image that hold something, from the base up."""
    lines = engine.ask("history", "--no-trunc", "--human=false", "--format={{json .}}", image)
    found = [json.loads(line) for line in lines.splitlines()]
    return [
        Layer(int(entry["Size"]), instruction(entry["CreatedBy"]))
        for entry in reversed(found)
        if int(entry["Size"])
    ]


def instruction(created_by: str) -> str:
    """An instruction as people know it, on one line."""
    text = " ".join(created_by.removesuffix("# buildkit").split())
    return re.sub(r"^RUN (\|\d+ .*? )?/bin/sh -c ", "RUN ", text) or "the base"


def table(target: str, found: list[Layer], seconds: float) -> str:
    """One screen: the layers, the sum, the time."""
    lines = [f"{'MB':>8}  layer"]
    lines += [f"{layer.size_bytes / 1e6:8.1f}  {layer.instruction[:88]}" for layer in found]
    total = sum(layer.size_bytes for layer in found)
    lines.append(f"{total / 1e6:8.1f}  {image_name(target)}, built in {seconds:.0f} s")
    return "\n".join(lines)


@dataclass(frozen=True)
class Times:
    """Seconds of a build and of the next, and the steps that the cache held before both."""

    build_s: float
    rebuild_s: float
    cached_steps_before: int


def cached_steps() -> int:
    """How many build steps the engine could reuse: 0 of an engine that never built."""
    rows = engine.ask("system", "df", "--format", "{{.Type}}\t{{.TotalCount}}").splitlines()
    counts = dict(row.split("\t") for row in rows)
    return int(counts["Build Cache"])


def report(target: str, found: list[Layer], times: Times, labels: dict[str, str]) -> dict[str, Any]:
    """What --report writes."""
    return {
        "schema_version": 1,
        "provenance": {
            **checkout(ROOT),
            "device": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "engine": engine.ask("version", "--format", "{{.Server.Version}}").strip(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        "target": target,
        "labels": labels,
        "build_s": round(times.build_s, 1),
        "rebuild_s": round(times.rebuild_s, 1),
        "cached_steps_before": times.cached_steps_before,
        "size_bytes": sum(layer.size_bytes for layer in found),
        "layers": [asdict(layer) for layer in found],
    }


def run(arguments: argparse.Namespace) -> None:
    """find_base -> build -> layers -> sbom."""
    target = arguments.target
    base = find_base(target, arguments.lock)
    before = cached_steps()
    given = build_arguments(target, base)
    seconds = build(target, given)
    image = image_name(target)
    found = layers(image)
    print(table(target, found, seconds))
    path = SBOM_FOLDER / f"{image.replace('/', '-').replace(':', '-')}.cdx.json"
    num_packages = sbom.write(image, path)
    print(f"image: {num_packages} packages in {path.relative_to(ROOT)}")
    if arguments.report:
        known = engine.inspect(image)
        assert known is not None
        times = Times(seconds, build(target, given), before)
        data = report(target, found, times, known["Config"]["Labels"])
        partial = arguments.report.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        partial.replace(arguments.report)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, build, return the exit status."""
    parser = argparse.ArgumentParser(prog="image.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("target", nargs="?", choices=("cpu", "gpu", "router"), default="cpu")
    parser.add_argument("--lock", action="store_true", help="write the base's digest to bases.json")
    parser.add_argument("--report", type=Path, metavar="FILE", help="sizes and times, as JSON")
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except engine.DockerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
