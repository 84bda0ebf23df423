#!/usr/bin/env python3
"""Mutation check of the guard tests: without its patch, each patch's `Test:` must fail.

For every patch an overlay of the installed `vllm` is made, in which that patch is taken out, and
put in front with PYTHONPATH. The control, with every patch in, must pass. Where there is no time
for all, `--within S --begin N` starts no patch after S seconds and begins with the N-th of the
series, counted round: with another N each time all have their turn. Standard library only.

Exit status: 0 every guard fails without its patch, 1 a guard or a control does not do what it
should, 2 bad usage or bad input.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import patchq  # noqa: E402


@dataclass(frozen=True)
class Outcome:
    """What pytest said; `passed` and `failed` count tests, errors are failures."""

    passed: int
    failed: int
    note: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.failed} failed, {self.passed} passed, {self.seconds:.0f} s; {self.note}"


def find_installed() -> Path:
    """The directory that contains the installed package, found without importing it."""
    spec = importlib.util.find_spec(patchq.PACKAGE)
    if spec is None or spec.origin is None:
        raise patchq.QueueError(f"{patchq.PACKAGE} is not installed for {sys.executable}")
    return Path(spec.origin).parent.parent


def pristine_images(queue: patchq.Queue, root: Path) -> dict[str, bytes | None]:
    """Pre-image of each touched file: the patches taken off again, checked against the lock."""
    if problems := patchq.verify(queue, root):
        raise patchq.CheckFailed(*problems, "run `apply` first")
    images = {path: patchq.read_below(root, path) for path in queue.touched()}
    for patch in reversed(queue.patches):
        for diff in patch.files:
            images[diff.path] = patchq.apply_diff(diff.reverse(), images[diff.path])
    for path, (before, _) in queue.lock.files.items():
        assert patchq.sha256(images[path]) == before, path
    return images


def without(
    queue: patchq.Queue, name: str, pristine: dict[str, bytes | None]
) -> tuple[dict[str, bytes | None], list[str]]:
    """The touched files with every patch but one.

    Later patches may move by the lines that are missing. One that needs the missing text itself
    is left out as well.

    Returns:
        (path -> content, names of the other patches that had to go).
    """
    images = dict(pristine)
    gone: list[str] = []
    for patch in queue.patches:
        if patch.name == name:
            continue
        moved = {diff.path: patchq.apply_moved(diff, images[diff.path]) for diff in patch.files}
        results = {path: result[0] for path, result in moved.items() if result}
        if len(results) < len(moved) or any(map(patchq.check_compiles, results, results.values())):
            gone.append(patch.name)
        else:
            images |= results
    return images, gone


def make_overlay(root: Path, overlay: Path, images: dict[str, bytes | None]) -> None:
    """A tree of links to the installed package below `overlay`, with `images` in its place.

    Byte code is linked too, so that only the changed files are compiled again; Python replaces a
    `.pyc` by a rename and so never writes through a link.
    """
    root = root.resolve()
    package = root / patchq.PACKAGE
    for directory, _, names in os.walk(package, followlinks=True):
        target = overlay / Path(directory).relative_to(root)
        target.mkdir(parents=True)
        for name in names:
            (target / name).symlink_to(Path(directory, name))
    for path, data in images.items():
        target = overlay / path
        target.unlink(missing_ok=True)
        for stale in (target.parent / "__pycache__").glob(f"{target.stem}.*.pyc"):
            stale.unlink()
        if data is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)


def run_guard(test: str, repository: Path, overlay: Path, timeout_s: float) -> Outcome:
    """Run one test file against the package below `overlay`, up to its first failure."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(overlay), env.get("PYTHONPATH")]))
    probe = f"import importlib.util as u; print(u.find_spec({patchq.PACKAGE!r}).origin)"
    found = subprocess.run(
        [sys.executable, "-c", probe], cwd=repository, env=env, capture_output=True, check=False
    ).stdout.decode()
    if not found.startswith(f"{overlay}{os.sep}"):
        raise patchq.QueueError(f"the overlay {overlay} is not imported, but {found.strip()}")
    report = overlay / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               f"--junitxml={report}", test]  # fmt: skip
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=repository, env=env, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(0, 1, f"no answer in {timeout_s:.0f} s", time.monotonic() - start)
    seconds = time.monotonic() - start
    if not report.exists():
        last = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-1:]
        return Outcome(0, 0, f"pytest status {done.returncode}: {''.join(last)}", seconds)
    cases = list(ElementTree.parse(report).iter("testcase"))
    broken = [found for case in cases for found in (*case.iter("failure"), *case.iter("error"))]
    skipped = sum(case.find("skipped") is not None for case in cases)
    messages = [b.get("message", "").partition("\n")[0] for b in broken]
    note = messages[0] if messages else "all skipped" if skipped == len(cases) else "all passed"
    return Outcome(max(len(cases) - len(broken) - skipped, 0), len(broken), note, seconds)


def check(
    queue: patchq.Queue, root: Path, patches: Sequence[patchq.Patch], timeout_s: float
) -> Iterator[tuple]:
    """Run the control and the mutant of each of these patches.

    Yields:
        (patch name, verdict, detail); the verdict is "killed", "SURVIVED" or "CONTROL FAILED".
    """
    repository = queue.directory.parent
    pristine = pristine_images(queue, root)
    installed = {path: patchq.read_below(root, path) for path in pristine}
    controls: dict[str, Outcome] = {}

    def guard(test: str, images: dict[str, bytes | None]) -> Outcome:
        # A process that a guard left behind may still write byte code there.
        with tempfile.TemporaryDirectory(prefix="patchq-", ignore_cleanup_errors=True) as name:
            make_overlay(root, Path(name), images)
            return run_guard(test, repository, Path(name), timeout_s)

    for patch in patches:
        test = patch.field("Test")
        if test not in controls:
            controls[test] = guard(test, installed)
        if controls[test].failed or not controls[test].passed:
            yield patch.name, "CONTROL FAILED", f"with all patches: {controls[test]}"
            continue
        images, gone = without(queue, patch.name, pristine)
        mutant = guard(test, images)
        detail = str(mutant) + (f"; reverted together with {', '.join(gone)}" if gone else "")
        yield patch.name, "killed" if mutant.failed else "SURVIVED", detail


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mutation", description=__doc__.split("\n")[0])
    parser.add_argument("--queue", type=Path, default=Path(patchq.__file__).parent)
    parser.add_argument("--root", type=Path, help="contains the patched vllm/; default: installed")
    parser.add_argument("--only", metavar="PATCH", help="file name of one patch")
    parser.add_argument("--begin", type=int, default=0, metavar="N", help="with the N-th patch")
    parser.add_argument("--within", type=float, metavar="S", help="start none after S seconds")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one test file")
    args = parser.parse_args(argv)
    try:
        queue = patchq.read_queue(args.queue)
        if args.only and args.only not in [patch.name for patch in queue.patches]:
            raise patchq.QueueError(f"--only {args.only}: not listed in series")
        patches = [p for p in queue.patches if args.only in (None, p.name)]
        first = args.begin % len(patches) if patches else 0
        patches = patches[first:] + patches[:first]
        width = max((len(patch.name) for patch in patches), default=0)
        bad = []
        left = [patch.name for patch in patches]
        start = time.monotonic()
        for name, verdict, detail in check(
            queue, args.root or find_installed(), patches, args.timeout
        ):
            print(f"{name:<{width}}  {verdict:<14}  {detail}", flush=True)
            left.remove(name)
            if verdict != "killed":
                bad.append(name)
            if args.within is not None and time.monotonic() - start > args.within:
                break
        if left:
            print(f"mutation: {args.within:.0f} s are over; left out: {', '.join(left)}")
    except patchq.QueueError as error:
        for problem in error.problems:
            print(f"mutation: {problem}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"mutation: {error}", file=sys.stderr)
        return patchq.BAD_INPUT
    for name in bad:
        print(f"mutation: {name}: its guard does not prove the patch", file=sys.stderr)
    return patchq.FAILED if bad else 0


if __name__ == "__main__":
    sys.exit(main())
