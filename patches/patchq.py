#!/usr/bin/env python3
"""The patch queue on the pinned vLLM: lint, apply, verify, edit, rebase.

One file, standard library only, so that it runs in an image that has neither git nor patch.
`lint`, `apply`, `verify`, `status`, `lock` and `check-wheel` need Python alone;
`checkout`, `export` and `rebase` need git; `fetch-wheel` and `rebase --to` without `--wheel`
need pip. ROOT is always the directory that contains the package folder `vllm/`.

Exit status: 0 done, 1 the check found a difference, 2 bad usage or bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import email.header
import email.parser
import fcntl
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

FAILED = 1
BAD_INPUT = 2
PACKAGE = "vllm"
STATE_FILE = ".vllm-patchq.json"  # below ROOT
BASE_TAG = "patchq-base"
OLD_BASE_TAG = "patchq-old-base"
REQUIRED_FIELDS = ("Symptom", "Forwarded", "Drop-when", "Test")
NOT_A_PLUGIN = "Not possible from a plugin"
ReadFile = Callable[[str], bytes | None]  # path in the package -> bytes, None when absent


class QueueError(Exception):
    """One or more problems, one line each: bad input, or an operation that cannot be done."""

    code = BAD_INPUT

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class CheckFailed(QueueError):
    """The input is well formed, but is not what the queue or the lock says."""

    code = FAILED


# --- the patch format -----------------------------------------------------------------------


@dataclass(frozen=True)
class Hunk:
    """One `@@` block. `lines` are (tag, text): tag is " ", "-" or "+", text has its newline."""

    number: int
    old_start: int
    old_len: int
    new_start: int
    new_len: int
    lines: tuple[tuple[str, bytes], ...]

    def side(self, dropped: str) -> list[bytes]:
        """The old side (dropped = "+") or the new side (dropped = "-")."""
        return [text for tag, text in self.lines if tag != dropped]

    @property
    def old_index(self) -> int:
        """0-based index of the first old line; `-N,0` inserts after line N."""
        return self.old_start - 1 if self.old_len else self.old_start

    @property
    def new_index(self) -> int:
        return self.new_start - 1 if self.new_len else self.new_start


@dataclass(frozen=True)
class FileDiff:
    """What one patch does to one file; `kind` is "modified", "new" or "deleted"."""

    patch: str
    path: str
    kind: str
    old_blob: str
    new_blob: str
    hunks: tuple[Hunk, ...]

    def reverse(self) -> FileDiff:
        """The diff that takes the post-image back to the pre-image."""
        swap = {" ": " ", "-": "+", "+": "-"}
        hunks = tuple(
            Hunk(
                h.number,
                h.new_start,
                h.new_len,
                h.old_start,
                h.old_len,
                tuple((swap[tag], text) for tag, text in h.lines),
            )
            for h in self.hunks
        )
        kind = {"new": "deleted", "deleted": "new"}.get(self.kind, self.kind)
        return FileDiff(self.patch, self.path, kind, self.new_blob, self.old_blob, hunks)


@dataclass(frozen=True)
class Patch:
    """A parsed `git format-patch` file."""

    name: str
    headers: dict[str, str]
    message: str
    files: tuple[FileDiff, ...]

    @property
    def subject(self) -> str:
        return re.sub(r"^\[PATCH\]\s*", "", self.headers.get("subject", ""))

    def field(self, key: str) -> str:
        """Value of the trailer `key:`, continuation lines joined; "" when absent."""
        match = re.search(rf"^{re.escape(key)}:(.*(?:\n[ \t]+\S.*)*)", self.message, re.MULTILINE)
        return " ".join(match.group(1).split()) if match else ""

    def count(self, tag: str) -> int:
        """Number of lines with the tag "+" or "-"."""
        return sum(t == tag for f in self.files for h in f.hunks for t, _ in h.lines)


def split_lines(data: bytes) -> list[bytes]:
    """Lines with their newline; a carriage return is an ordinary character, as for git."""
    return re.findall(rb"[^\n]*\n|[^\n]+", data)


def parse_patch(name: str, data: bytes) -> Patch:
    """Parse a `git format-patch --zero-commit --no-signature --full-index` file.

    Raises:
        QueueError: not of that form; renames, mode changes and binary files are refused too.
    """
    lines = split_lines(data)
    first_diff = next((i for i, x in enumerate(lines) if x.startswith(b"diff --git ")), None)
    if first_diff is None:
        raise QueueError(f"{name}: no `diff --git` line; a patch changes at least one file")
    if not re.fullmatch(rb"From 0{40} \S.*\n", lines[0]):
        raise QueueError(f"{name}: line 1: expected `From {'0' * 40} ...` (--zero-commit)")
    try:
        text = b"".join(lines[1:first_diff]).decode()
    except UnicodeDecodeError as error:
        raise QueueError(f"{name}: the message is not UTF-8: {error}") from None
    mail = email.parser.Parser().parsestr(text)
    headers = {
        key.lower(): re.sub(
            r"\s*\n\s*", " ", str(email.header.make_header(email.header.decode_header(value)))
        )
        for key, value in mail.items()
    }
    message = re.split(r"^---$", mail.get_payload(), maxsplit=1, flags=re.MULTILINE)[0]
    files, at = [], first_diff
    while at < len(lines) and lines[at].startswith(b"diff --git "):
        diff, at = _parse_file(name, lines, at)
        files.append(diff)
    for number, line in enumerate(lines[at:], at + 1):
        if line == b"-- \n":
            raise QueueError(
                f"{name}: line {number}: signature trailer; export with --no-signature"
            )
        if line.strip():
            raise QueueError(f"{name}: line {number}: {line!r} belongs to no hunk")
    paths = [diff.path for diff in files]
    if len(set(paths)) != len(paths):
        raise QueueError(f"{name}: a file appears twice: {', '.join(paths)}")
    return Patch(name, headers, message, tuple(files))


def _parse_file(name: str, lines: list[bytes], at: int) -> tuple[FileDiff, int]:
    def refuse(rule: str) -> QueueError:
        found = lines[at].rstrip(b"\n").decode(errors="replace") if at < len(lines) else "the end"
        return QueueError(f"{name}: line {at + 1}: found `{found}`; {rule}")

    def take(pattern: bytes) -> re.Match[bytes] | None:
        nonlocal at
        match = re.fullmatch(pattern, lines[at]) if at < len(lines) else None
        at += match is not None
        return match

    header = take(rb"diff --git a/(\S+) b/(\S+)\n")
    if not header or header[1] != header[2]:
        raise refuse("expected `diff --git a/PATH b/PATH` with one PATH (--no-renames)")
    path = header[1].decode()
    if not re.fullmatch(rf"{PACKAGE}/[\w.@+/-]+", path) or ".." in PurePosixPath(path).parts:
        raise QueueError(f"{name}: {path} is not below {PACKAGE}/")
    kind = "modified"
    if take(rb"new file mode 100644\n"):
        kind = "new"
    elif take(rb"deleted file mode 100644\n"):
        kind = "deleted"
    index = take(rb"index ([0-9a-f]{40})\.\.([0-9a-f]{40})(?: 100(?:644|755))?\n")
    if not index:
        raise refuse("expected `index BLOB..BLOB` (--full-index; no renames, modes or binaries)")
    hunks: list[Hunk] = []
    old_name, new_name = (b"a/" + header[1], b"b/" + header[1])
    old_name = b"/dev/null" if kind == "new" else old_name
    new_name = b"/dev/null" if kind == "deleted" else new_name
    if take(rb"--- " + re.escape(old_name) + rb"\n"):
        if not take(rb"\+\+\+ " + re.escape(new_name) + rb"\n"):
            raise refuse(f"expected `+++ {new_name.decode()}`")
        while match := take(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@.*\n"):
            old_start, new_start = int(match[1]), int(match[3])
            old_len, new_len = (int(match[i] or b"1") for i in (2, 4))
            body: list[tuple[str, bytes]] = []
            old_left, new_left = old_len, new_len
            while old_left or new_left or lines[at : at + 1] == [b"\\ No newline at end of file\n"]:
                if take(rb"\\ No newline at end of file\n"):
                    if not body or not body[-1][1].endswith(b"\n"):
                        raise refuse("`\\ No newline` must follow a line of the hunk")
                    body[-1] = (body[-1][0], body[-1][1][:-1])
                    continue
                line = take(rb"([ +-])([^\n]*\n)")
                if not line:
                    raise refuse(f"hunk {len(hunks) + 1} misses -{old_left},+{new_left} lines")
                tag = line[1].decode()
                old_left, new_left = old_left - (tag != "+"), new_left - (tag != "-")
                if old_left < 0 or new_left < 0:
                    raise refuse(f"hunk {len(hunks) + 1} has more lines than its header says")
                body.append((tag, line[2]))
            hunks.append(Hunk(len(hunks) + 1, old_start, old_len, new_start, new_len, tuple(body)))
        if not hunks:
            raise refuse("expected a hunk")
    elif kind == "modified":
        raise refuse(f"expected `--- {old_name.decode()}`")
    return FileDiff(name, path, kind, index[1].decode(), index[2].decode(), tuple(hunks)), at


# --- applying -------------------------------------------------------------------------------


def apply_diff(diff: FileDiff, source: bytes | None) -> bytes | None:
    """Apply one file's hunks: no fuzz, no offset.

    Args:
        source: content before; None means that the file does not exist.
    Returns:
        Content after, None for a deleted file.
    Raises:
        QueueError (status 1): names patch, file, hunk, line, the expected and the found text.
    """
    where = f"{diff.patch}: {diff.path}"
    if diff.kind == "new" and source is not None:
        raise CheckFailed(f"{where}: the patch creates this file, but it exists")
    if diff.kind != "new" and source is None:
        raise CheckFailed(f"{where}: the file does not exist")
    old = split_lines(source or b"")
    new: list[bytes] = []
    at = 0
    for hunk in diff.hunks:
        here = f"{where}: hunk {hunk.number}"
        if hunk.old_index < at:
            raise CheckFailed(f"{here}: line {hunk.old_start} overlaps the hunk before")
        new += old[at : hunk.old_index]
        at = hunk.old_index
        if len(new) != hunk.new_index:
            raise CheckFailed(
                f"{here}: new side starts at line {hunk.new_start}, but {len(new)} lines precede "
                "it (a hunk applies at exactly its stated line)"
            )
        for tag, text in hunk.lines:
            if tag != "+":
                found = old[at] if at < len(old) else None
                if found != text:
                    raise CheckFailed(
                        f"{here}: line {at + 1}: expected {_show(text)}, found {_show(found)} "
                        "(context must match at exactly the stated line)"
                    )
                at += 1
            if tag != "-":
                new.append(text)
    new += old[at:]
    if any(not line.endswith(b"\n") for line in new[:-1]):
        raise CheckFailed(f"{where}: a line without a newline is not the last one")
    if diff.kind == "deleted":
        if new:
            raise CheckFailed(f"{where}: the patch deletes the file but leaves {len(new)} lines")
        return None
    return b"".join(new)


def _show(text: bytes | None) -> str:
    return "the end of the file" if text is None else repr(text.decode(errors="replace"))


def apply_moved(diff: FileDiff, source: bytes | None) -> tuple[bytes | None, list[int]] | None:
    """Like `apply_diff`, but a hunk whose old side is intact may have moved.

    For `rebase` and the mutation check only; `apply` never uses it.

    Returns:
        (content, per hunk the offset in lines), or None when an old side is not there.
    """
    if diff.kind != "modified" or source is None:
        try:
            return apply_diff(diff, source), []
        except QueueError:
            return None
    old = split_lines(source)
    new: list[bytes] = []
    offsets: list[int] = []
    at = 0
    for hunk in diff.hunks:
        block = hunk.side("+")
        places = [
            i for i in range(at, len(old) - len(block) + 1) if old[i : i + len(block)] == block
        ]
        if not places:
            return None
        expected = hunk.old_index + (offsets[-1] if offsets else 0)
        place = min(places, key=lambda i: abs(i - expected))
        new += old[at:place] + hunk.side("-")
        at = place + len(block)
        offsets.append(place - hunk.old_index)
    return b"".join(new + old[at:]), offsets


def apply_series(patches: tuple[Patch, ...], read: ReadFile) -> dict[str, bytes | None]:
    """Post-image of every file that `patches` touch, starting from what `read` returns."""
    images: dict[str, bytes | None] = {}
    for patch in patches:
        for diff in patch.files:
            source = images[diff.path] if diff.path in images else read(diff.path)
            images[diff.path] = apply_diff(diff, source)
    return images


def check_compiles(path: str, data: bytes | None) -> str | None:
    """Why `data` is not valid Python, or None. Only `.py` files are looked at."""
    if data is None or not path.endswith(".py"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(data, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        return f"{path}: does not compile: {error}"
    return None


def sha256(data: bytes | None) -> str | None:
    """Hex digest; None stands for an absent file."""
    return None if data is None else hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a large file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the queue on disk ----------------------------------------------------------------------


@dataclass(frozen=True)
class Lock:
    """`vllm.lock`: the pin, and the pre- and post-image hash of each touched file.

    `differs` lists the Python files whose bytes are not the same in all pinned wheels; one
    series serves every wheel, so no patch may touch them. The sha256 of the lock file names
    pin and series together: it is what a benchmark result records.
    """

    version: str
    wheels: dict[str, dict[str, str]]
    differs: tuple[str, ...]
    files: dict[str, tuple[str | None, str | None]]

    def dump(self) -> bytes:
        files = {p: {"before": b, "after": a} for p, (b, a) in sorted(self.files.items())}
        data = {
            "version": self.version,
            "wheels": self.wheels,
            "differs": sorted(self.differs),
            "files": files,
        }
        return json.dumps(data, indent=2).encode() + b"\n"


@dataclass(frozen=True)
class Queue:
    """The directory with `series`, `vllm.lock` and the patches, in order."""

    directory: Path
    lock: Lock
    patches: tuple[Patch, ...]

    def touched(self) -> list[str]:
        return sorted({diff.path for patch in self.patches for diff in patch.files})


def read_lock(directory: Path) -> Lock:
    """Read `vllm.lock`."""
    path = directory / "vllm.lock"
    try:
        data = json.loads(path.read_text())
        return Lock(
            version=data["version"],
            wheels={
                k: {"file": v["file"], "sha256": v["sha256"]} for k, v in data["wheels"].items()
            },
            differs=tuple(data.get("differs", ())),
            files={p: (v["before"], v["after"]) for p, v in data["files"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QueueError(f"{path}: not a lock file: {type(error).__name__}: {error}") from None


def read_series(directory: Path) -> list[str]:
    """Patch names in order; `#` starts a comment."""
    lines = (directory / "series").read_text().splitlines()
    return [name for line in lines if (name := line.split("#")[0].strip())]


def read_queue(directory: Path) -> Queue:
    """Read and parse the whole queue."""
    patches = []
    for name in read_series(directory):
        file = directory / name
        if not file.is_file():
            raise QueueError(f"series lists {name}, but {file} does not exist")
        patches.append(parse_patch(name, file.read_bytes()))
    return Queue(directory, read_lock(directory), tuple(patches))


def lint(directory: Path) -> list[str]:
    """Every problem of the queue itself, one line each; an empty list means that it is good."""
    problems: list[str] = []
    names = read_series(directory)
    problems += [
        f"series: {n} is listed twice" for n in sorted({n for n in names if names.count(n) > 1})
    ]
    present = {p.name for p in directory.glob("*.patch")}
    problems += [f"series: {n} does not exist" for n in names if n not in present]
    problems += [f"{n}: not listed in series" for n in sorted(present - set(names))]
    lock = read_lock(directory)
    blobs: dict[str, tuple[str, str]] = {}  # path -> (blob id after the last patch, its name)
    touched: set[str] = set()
    authors: dict[str, str] = {}  # -> the first patch of each
    for name in dict.fromkeys(n for n in names if n in present):
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*[a-z0-9]\.patch", name) or name[0].isdigit():
            problems.append(f"{name}: a name is lower-case words joined by `-`, no number in front")
        try:
            patch = parse_patch(name, (directory / name).read_bytes())
        except QueueError as error:
            problems += error.problems
            continue
        problems += _lint_message(patch, directory.parent)
        if author := patch.headers.get("from"):
            authors.setdefault(author, name)
        for diff in patch.files:
            touched.add(diff.path)
            if diff.path in lock.differs:
                problems.append(f"{name}: {diff.path} is not the same file in all pinned wheels")
            blob, before = blobs.get(diff.path, (diff.old_blob, ""))
            if blob != diff.old_blob:
                problems.append(
                    f"{name}: {diff.path}: starts from another text than {before} "
                    "leaves; export the queue again"
                )
            blobs[diff.path] = (diff.new_blob, name)
    if len(authors) > 1:
        shown = "; ".join(f"{name} is from {author}" for author, name in authors.items())
        problems.append(f"{shown}; a queue has one author")
    problems += [
        f"vllm.lock: {p} is missing (a patch touches it)" for p in sorted(touched - set(lock.files))
    ]
    problems += [
        f"vllm.lock: {p} is listed (no patch touches it)" for p in sorted(set(lock.files) - touched)
    ]
    return problems


def _lint_message(patch: Patch, repository: Path) -> list[str]:
    problems = []
    for key in ("from", "date"):
        if not patch.headers.get(key):
            problems.append(f"{patch.name}: no `{key.title()}:` header")
    if not re.match(r"\[PATCH\] \S", patch.headers.get("subject", "")):
        problems.append(f"{patch.name}: expected `Subject: [PATCH] area: what changes`")
    for key in REQUIRED_FIELDS:
        if not patch.field(key):
            problems.append(f"{patch.name}: no `{key}:` field in the message")
    if not re.search(rf"^{NOT_A_PLUGIN}: *\S", patch.message, re.MULTILINE):
        problems.append(f"{patch.name}: no line `{NOT_A_PLUGIN}: REASON`")
    forwarded = patch.field("Forwarded")
    if forwarded and not re.match(r"https://\S+|no\b|not-needed\b", forwarded):
        problems.append(
            f"{patch.name}: `Forwarded: {forwarded}` is not a https URL, no or not-needed"
        )
    test = patch.field("Test")
    if test and not (repository / test).is_file():
        problems.append(f"{patch.name}: `Test: {test}` does not exist")
    return problems


# --- an installed package -------------------------------------------------------------------


def read_below(root: Path, path: str) -> bytes | None:
    """Content of ROOT/path, None when absent."""
    try:
        return (root / path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def check_root(root: Path) -> None:
    """Refuse a directory that does not contain the package."""
    if not (root / PACKAGE).is_dir():
        raise QueueError(
            f"--root {root}: has no folder {PACKAGE}/; name the directory that contains the package"
        )


def read_state(root: Path) -> dict[str, dict]:
    """What `apply` did below ROOT, however long ago and with whatever series.

    Returns:
        path -> {"before": pre-image or None, "after": hash of every post-image written}.
    Source: `.vllm-patchq.json`, where a pre-image is text in latin-1, so that any bytes fit.
    """
    try:
        state = json.loads(read_below(root, STATE_FILE) or b"{}")
        return {
            path: {
                "before": None if entry["before"] is None else entry["before"].encode("latin-1"),
                "after": list(entry["after"]),
            }
            for path, entry in state.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QueueError(
            f"{root / STATE_FILE}: not what apply writes ({error}); install vllm again without it"
        ) from None


def _write_state(root: Path, state: dict[str, dict]) -> None:
    text = {
        path: {
            "before": None if entry["before"] is None else entry["before"].decode("latin-1"),
            "after": entry["after"],
        }
        for path, entry in state.items()
    }
    _replace(root / STATE_FILE, json.dumps(text, indent=1, sort_keys=True).encode())


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.patchq-tmp")


def _write_temporary(target: Path, data: bytes) -> Path:
    temporary = _temporary(target)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o644)
    return temporary


def _replace(target: Path, data: bytes) -> None:
    """Write through a rename: a hard link to the old file keeps the old content."""
    try:
        _write_temporary(target, data).replace(target)
    except OSError:
        _temporary(target).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def apply_queue(queue: Queue, root: Path) -> str:
    """Bring ROOT to the queue's post-image, all files or none.

    A file may be the lock's pre-image, its post-image, or what an earlier series made of the
    pre-image; the last starts from the pre-image again, and a file that the queue no longer
    touches goes back to it. Files are written beside their target and renamed, so after a kill
    each one is wholly old or wholly new, and the next call completes the work.

    Returns:
        What was done, in one line.
    Raises:
        QueueError (status 1): names each file that is none of these; nothing was changed.
    """
    check_root(root)
    lock = queue.lock
    if queue.touched() != sorted(lock.files):
        raise QueueError("vllm.lock does not list exactly the touched files; run `lint`")
    with _exclusive(root):
        state = read_state(root)
        current = {path: read_below(root, path) for path in {*lock.files, *state}}
        sources, wanted, problems = {}, {}, []
        for path, content in sorted(current.items()):
            digest = sha256(content)
            ours = path in state and digest in state[path]["after"]
            before, after = lock.files.get(path, (None, None))
            if path not in lock.files:
                if ours:
                    wanted[path] = sources[path] = state[path]["before"]
            elif digest != after:
                source = state[path]["before"] if ours and digest != before else content
                sources[path] = source
                if sha256(source) != before:
                    problems.append(
                        f"{path}: {_describe(digest)} is neither the pre-image {_describe(before)}"
                        f" nor the post-image {_describe(after)} of vllm {lock.version}"
                    )
        if problems:
            raise CheckFailed(*problems, "nothing was changed; install vllm again")
        wanted |= _post_images(queue, sources)
        for path, data in wanted.items():
            entry = state.get(path)
            if not entry or entry["before"] != sources[path]:
                entry = state[path] = {"before": sources[path], "after": []}
            if sha256(data) not in (*entry["after"], sha256(sources[path])):
                entry["after"].append(sha256(data))
        if wanted:
            _write_state(root, state)
            _swap(root, wanted, current)
    count = f"{len(queue.patches)} patches, {len(lock.files)} files"
    return f"applied: {count}, {len(wanted)} written" if wanted else f"already applied: {count}"


def _describe(digest: str | None) -> str:
    return digest[:12] if digest else "(no file)"


def _post_images(queue: Queue, sources: dict[str, bytes | None]) -> dict[str, bytes | None]:
    patches = tuple(
        replace(patch, files=tuple(d for d in patch.files if d.path in sources))
        for patch in queue.patches
    )
    images = apply_series(patches, sources.__getitem__)
    problems = [
        f"{path}: the series gives {_describe(sha256(data))}, vllm.lock says "
        f"{_describe(queue.lock.files[path][1])}; run `lock`"
        for path, data in images.items()
        if sha256(data) != queue.lock.files[path][1]
    ]
    problems += [p for path, data in images.items() if (p := check_compiles(path, data))]
    if problems:
        raise CheckFailed(*problems, "nothing was changed")
    return images


def _swap(root: Path, wanted: dict[str, bytes | None], current: dict[str, bytes | None]) -> None:
    """Replace every file of `wanted`; on any failure put `current` back and raise."""
    made: list[Path] = []
    swapped: list[str] = []
    try:
        for path, data in wanted.items():
            target = root / path
            missing = [p for p in target.parents if not p.exists()]
            if data is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                made += missing
                _write_temporary(target, data)
        for path, data in wanted.items():
            target = root / path
            for stale in (target.parent / "__pycache__").glob(f"{target.stem}.*.pyc"):
                stale.unlink()
            swapped.append(path)
            if data is None:
                target.unlink(missing_ok=True)
                for directory in (target.parent / "__pycache__", target.parent):
                    with contextlib.suppress(OSError):
                        directory.rmdir()  # only an empty one goes
            else:
                _temporary(target).replace(target)
    except BaseException:
        for path in swapped:
            old = current[path]
            if old is None:
                (root / path).unlink(missing_ok=True)
            elif read_below(root, path) != old:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                _replace(root / path, old)
        for path in wanted:
            with contextlib.suppress(OSError):
                _temporary(root / path).unlink(missing_ok=True)
        for directory in sorted(made, key=lambda d: -len(d.parts)):
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def verify(queue: Queue, root: Path) -> list[str]:
    """Files of ROOT that are not the lock's post-image: `path: missing|unpatched|modified`."""
    check_root(root)
    problems = []
    for path, (before, after) in sorted(queue.lock.files.items()):
        digest = sha256(read_below(root, path))
        if digest == after:
            continue
        how = "unpatched" if digest == before else "missing" if digest is None else "modified"
        problems.append(f"{path}: {how} ({_describe(digest)}, expected {_describe(after)})")
    for path, entry in sorted(read_state(root).items()):
        if path not in queue.lock.files and sha256(read_below(root, path)) in entry["after"]:
            problems.append(f"{path}: modified (an earlier series patched it, this one does not)")
    return problems


def patch_state(patch: Patch, lock: Lock, root: Path) -> str:
    """State of one patch in ROOT, from whole-file hashes: applied, not applied or differs."""
    states = set()
    for diff in patch.files:
        digest = sha256(read_below(root, diff.path))
        before, after = lock.files.get(diff.path, ("", ""))
        states.add(
            "applied" if digest == after else "not applied" if digest == before else "differs"
        )
    return states.pop() if len(states) == 1 else "differs"


# --- wheels ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A package to read from: a wheel, or a directory that contains `vllm/`."""

    label: str
    version: str
    read: ReadFile
    names: tuple[str, ...]


def open_wheel(file: Path) -> Source:
    """A wheel's package files, read without unpacking."""
    fields = file.name.split("-")
    if file.suffix != ".whl" or len(fields) < 5:
        raise QueueError(f"{file}: not a wheel file name")
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise QueueError(f"{file}: not a wheel: {error}") from None
    names = frozenset(archive.namelist())

    def read(path: str) -> bytes | None:
        return archive.read(path) if path in names else None

    inside = tuple(sorted(n for n in names if n.startswith(f"{PACKAGE}/") and not n.endswith("/")))
    return Source(file.name, fields[1], read, inside)


def open_root(root: Path, lock: Lock) -> Source:
    """A pristine unpacked wheel or site-packages; its files are checked against RECORD."""
    check_root(root)
    records = [
        r for name in lock.wheels for r in root.glob(f"{name.replace('-', '_')}-*.dist-info/RECORD")
    ]
    if len(records) != 1:
        raise QueueError(
            f"--root {root}: {len(records)} dist-info/RECORD of "
            f"{' or '.join(lock.wheels)}; exactly one tells what is pristine"
        )
    names = []
    for line in records[0].read_text().splitlines():
        path, _, _ = line.rsplit(",", 2)
        if path.startswith(f"{PACKAGE}/") and "/__pycache__/" not in path:
            names.append((path, line))
    recorded = dict(names)

    def read(path: str) -> bytes | None:
        data = read_below(root, path)
        want = recorded.get(path, ",,").rsplit(",", 2)[1]
        found = f"sha256={_urlsafe(data)}" if data is not None else ""
        if found != want:
            raise CheckFailed(
                f"{root / path}: not the file that RECORD lists; the root must be pristine"
            )
        return data

    version = records[0].parent.name.removesuffix(".dist-info").rsplit("-", 1)[1]
    return Source(f"{PACKAGE} {version}", version, read, tuple(sorted(recorded)))


def _urlsafe(data: bytes) -> str:
    from base64 import urlsafe_b64encode

    return urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def check_wheel(lock: Lock, file: Path) -> str:
    """Refuse (status 1) a wheel whose sha256 is not a locked one; else return its package."""
    if not file.is_file():
        raise QueueError(f"check-wheel: {file} does not exist")
    name = file.name.split("-")[0].replace("_", "-")
    if name not in lock.wheels:
        raise QueueError(
            f"check-wheel: {file.name} is none of the locked wheels ({', '.join(lock.wheels)})"
        )
    found, locked = sha256_file(file), lock.wheels[name]["sha256"]
    if found != locked:
        raise CheckFailed(
            f"check-wheel: {file.name} has sha256 {found}, vllm.lock says {locked}; "
            "only the locked wheel may be used"
        )
    return name


def download(package: str, version: str, destination: Path) -> Path:
    """`pip download` of one wheel without its dependencies."""
    destination.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(destination),
        f"{package}=={version}",
    ]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    files = sorted(destination.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
    if done.returncode or not files:
        raise QueueError(f"pip download {package}=={version} failed with status {done.returncode}")
    return files[0]


def make_lock(queue: Queue, sources: list[Source], wheels: list[Path]) -> Lock:
    """The lock for these pristine sources: the series must apply to each and give the same."""
    lock = queue.lock
    if wheels:
        versions = sorted({s.version for s in sources})
        if len(versions) != 1:
            raise QueueError(f"lock: wheels of {' and '.join(versions)}; one lock pins one version")
        shared = set.intersection(*(set(s.names) for s in sources))
        differs = tuple(
            n for n in sorted(shared) if n.endswith(".py") and len({s.read(n) for s in sources}) > 1
        )
        pins = {
            w.name.split("-")[0].replace("_", "-"): {"file": w.name, "sha256": sha256_file(w)}
            for w in wheels
        }
        lock = replace(lock, version=versions[0], wheels=pins, differs=differs)
    files: dict[str, tuple[str | None, str | None]] = {}
    for source in sources:
        after = apply_series(queue.patches, source.read)
        for path, data in after.items():
            pair = (sha256(source.read(path)), sha256(data))
            if files.setdefault(path, pair) != pair:
                raise CheckFailed(
                    f"lock: {path} differs in {source.label}; a patch may only touch "
                    "files that all pinned wheels share"
                )
    return replace(lock, files=files)


# --- editing with git -----------------------------------------------------------------------

FORMAT_PATCH = """
    format-patch -1 --stdout --no-stat -p --zero-commit --no-signature --full-index --no-renames
    --no-numbered --subject-prefix=PATCH --no-attach --no-thread --no-cover-letter --no-base
    --no-notes --no-to --no-cc --no-ext-diff --no-textconv --no-color --diff-algorithm=myers
    --unified=3 --indent-heuristic --src-prefix=a/ --dst-prefix=b/ --encode-email-headers
"""


def git(directory: Path, *arguments: str, data: bytes | None = None) -> bytes:
    """Run git with neither the user's nor the system's configuration; return its output."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    for who in ("AUTHOR", "COMMITTER"):
        env |= {
            f"GIT_{who}_NAME": "patchq",
            f"GIT_{who}_EMAIL": "patchq@localhost",
            f"GIT_{who}_DATE": "2000-01-01T00:00:00Z",
        }
    # What git would leave running in the background makes and removes files of the worktree.
    options = ("core.autocrlf=false", "gc.autoDetach=false", "maintenance.autoDetach=false")
    settings = [word for option in options for word in ("-c", option)]
    command = ["git", "-C", str(directory), *settings, *arguments]
    done = subprocess.run(command, input=data, capture_output=True, env=env, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise CheckFailed(f"git {arguments[0]} in {directory}: {'; '.join(said) or 'failed'}")
    return done.stdout


def checkout(queue: Queue, source: Source, worktree: Path, onto: Source | None = None) -> None:
    """Make a git repository: one commit with the pristine package, then one per patch.

    With `onto` (the package of another version) the tag `patchq-base` is that package, ready
    for `git rebase --onto patchq-base patchq-old-base`.
    """
    if worktree.exists() and any(worktree.iterdir()):
        raise QueueError(f"checkout: {worktree} is not empty")
    apply_series(queue.patches, source.read)  # strict: fails here with the exact line
    worktree.mkdir(parents=True, exist_ok=True)
    git(worktree, "init", "--quiet", "--initial-branch=patches")
    author = {"user.name": "dsv4-maxq", "user.email": "dsv4-maxq@example.org"}
    for key, value in {"core.autocrlf": "false", "commit.gpgSign": "false", **author}.items():
        git(worktree, "config", key, value)
    (worktree / ".git" / "info").mkdir(exist_ok=True)
    (worktree / ".git" / "info" / "exclude").write_text("__pycache__/\n*.so\n")
    (worktree / ".git" / "info" / "attributes").write_text("* -text\n")
    _commit_package(worktree, source)
    git(worktree, "tag", BASE_TAG)
    if onto:
        git(worktree, "tag", OLD_BASE_TAG)
        git(worktree, "rm", "-r", "--quiet", PACKAGE)
        _commit_package(worktree, onto)
        git(worktree, "tag", "--force", BASE_TAG)
        git(worktree, "reset", "--hard", "--quiet", OLD_BASE_TAG)
    for patch in queue.patches:
        git(
            worktree,
            "am",
            "--quiet",
            "--keep-cr",
            "--keep-non-patch",
            "--no-3way",
            "--committer-date-is-author-date",
            str((queue.directory / patch.name).resolve()),
        )


def _commit_package(worktree: Path, source: Source) -> None:
    for name in source.names:
        if name.endswith(".so") or ".so." in name:
            continue
        data = source.read(name)
        if data is None or b"\0" in data[:8000]:  # git's own test for a binary file
            continue
        target = worktree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    git(worktree, "add", "--force", "--", PACKAGE)
    git(worktree, "commit", "--quiet", "--message", f"{PACKAGE} {source.version}, pristine")


def slug(subject: str) -> str:
    """File name for a subject: lower-case words joined by `-`, at most about 60 characters."""
    words = re.findall(r"[a-z0-9]+", subject.lower().replace("'", ""))
    while len("-".join(words)) > 60:
        words.pop()
    return "-".join(words) + ".patch"


def export(directory: Path, worktree: Path, base: str = BASE_TAG) -> list[str]:
    """Write the commits `base..HEAD` of a worktree as the queue; returns what changed.

    A patch keeps its file name while its subject stays the same.
    """
    lock = read_lock(directory)
    if git(worktree, "status", "--porcelain", "--untracked-files=all"):
        raise QueueError(f"export: {worktree} has uncommitted changes; commit them first")
    if git(worktree, "rev-list", "--merges", f"{base}..HEAD"):
        raise QueueError(f"export: {base}..HEAD has a merge; a queue is a straight line")
    git(worktree, "merge-base", "--is-ancestor", base, "HEAD")
    known = {}
    for file in sorted(directory.glob("*.patch")):
        with contextlib.suppress(QueueError):
            known[parse_patch(file.name, file.read_bytes()).subject] = file.name
    contents: dict[str, bytes] = {}
    patches: list[Patch] = []
    for commit in git(worktree, "rev-list", "--reverse", f"{base}..HEAD").decode().split():
        data = git(worktree, *FORMAT_PATCH.split(), commit)
        patch = parse_patch(commit[:12], data)
        if re.match(r"(fixup|squash|amend)! ", patch.subject):
            raise QueueError(f"export: `{patch.subject}`: run `git rebase -i --autosquash {base}`")
        name = known.get(patch.subject) or slug(patch.subject)
        if name in contents:
            raise QueueError(f"export: two commits give {name}; subjects must differ")
        contents[name] = data
        patches.append(replace(patch, name=name))
    queue = Queue(directory, lock, tuple(patches))
    files = {
        p: (sha256(_show_file(worktree, base, p)), sha256(_show_file(worktree, "HEAD", p)))
        for p in queue.touched()
    }
    contents["series"] = _series_text(directory, [p.name for p in patches])
    contents["vllm.lock"] = replace(lock, files=files).dump()
    changes = []
    for name, data in contents.items():
        if read_below(directory, name) != data:
            _replace(directory / name, data)
            changes.append(f"wrote {name}")
    for file in sorted(directory.glob("*.patch")):
        if file.name not in contents:
            file.unlink()
            changes.append(f"removed {file.name}")
    return changes


def _show_file(worktree: Path, commit: str, path: str) -> bytes | None:
    if not git(worktree, "ls-tree", commit, "--", path):
        return None
    return git(worktree, "cat-file", "blob", f"{commit}:{path}")


def _series_text(directory: Path, names: list[str]) -> bytes:
    """The new `series`: the comments at its head stay."""
    old = (read_below(directory, "series") or b"").decode().splitlines()
    head = itertools.takewhile(lambda line: not line.strip() or line.startswith("#"), old)
    return "".join(f"{line}\n" for line in [*head, *names]).encode()


# --- rebasing -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What happens to one patch on another version of the package."""

    patch: Patch
    state: str  # "clean", "offset", "conflict" or "already upstream"
    details: tuple[str, ...]


def rebase(queue: Queue, old: Source, new: Source) -> list[Verdict]:
    """Try each patch, in order, on `new`; nothing on disk is changed.

    clean: applies strictly. offset: the text moved, or merges three-way without a conflict.
    already upstream: the new version contains the change. A patch that conflicts is left out
    for those after it.
    """
    for path, (before, _) in queue.lock.files.items():
        if sha256(old.read(path)) != before:
            raise CheckFailed(f"rebase: {path} of {old.label} is not the pre-image in vllm.lock")
    ours: dict[str, bytes | None] = {}  # the new package with the patches so far
    theirs: dict[str, bytes | None] = {}  # the old package with the patches so far
    verdicts = []
    for patch in queue.patches:
        results = {}
        for diff in patch.files:
            path = diff.path
            before = theirs[path] if path in theirs else old.read(path)
            mine = ours[path] if path in ours else new.read(path)
            theirs[path] = apply_diff(diff, before)
            results[path] = _rebase_file(diff, before, theirs[path], mine, new)
        states = {state for state, _, _ in results.values()}
        if "conflict" in states:
            state = "conflict"
        else:
            state = states.pop() if len(states) == 1 else "offset"
            ours |= {path: image for path, (_, image, _) in results.items()}
        details = tuple(f"{p}: {s}{d and f' ({d})'}" for p, (s, _, d) in results.items())
        verdicts.append(Verdict(patch, state, details))
    return verdicts


def _rebase_file(
    diff: FileDiff, before: bytes | None, after: bytes | None, mine: bytes | None, new: Source
) -> tuple[str, bytes | None, str]:
    if mine == after:
        return "already upstream", mine, ""
    if mine == before:
        return "clean", after, "file unchanged upstream"
    if mine is None:
        same_name = PurePosixPath(diff.path).name
        moved = [n for n in new.names if PurePosixPath(n).name == same_name]
        hint = f"; same name: {', '.join(moved[:3])}" if moved and len(moved) <= 3 else ""
        return "conflict", None, f"file is gone upstream{hint}"
    if before is None or after is None:
        return "conflict", mine, f"{diff.kind} here, but upstream has another version"
    merged, conflicts = merge_three_way(mine, before, after)
    if merged == mine:
        return "already upstream", mine, ""
    with contextlib.suppress(QueueError):
        return "clean", apply_diff(diff, mine), "lines unmoved"
    moved_to = apply_moved(diff, mine)
    if moved_to:
        merged, conflicts = moved_to[0] or b"", 0
        note = "moved by " + ", ".join(f"{o:+d}" for o in moved_to[1]) + " lines"
    else:
        marks = [n for n, x in enumerate(split_lines(merged), 1) if x.startswith(b"<<<<<<< ")]
        at = ", ".join(map(str, marks))
        note = f"upstream changed the same lines, near {at}" if conflicts else "merges three-way"
    if not conflicts and check_compiles(diff.path, merged):
        return "conflict", mine, f"{note}; the result does not compile"
    return ("conflict", mine, note) if conflicts else ("offset", merged, note)


def merge_three_way(ours: bytes, base: bytes, theirs: bytes) -> tuple[bytes, int]:
    """`git merge-file`: the merged text and the number of conflicting regions."""
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / x for x in ("ours", "base", "theirs")]
        for file, data in zip(files, (ours, base, theirs), strict=True):
            file.write_bytes(data)
        done = subprocess.run(
            ["git", "merge-file", "-p", "-q", *map(str, files)], capture_output=True, check=False
        )
        if done.returncode > 127:
            raise QueueError(f"git merge-file: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout, done.returncode


def table(rows: list[tuple[str, ...]], markdown: bool = False) -> str:
    """Rows (the first one is the head) as aligned text or as a Markdown table."""
    if markdown:
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in padded)


def rebase_report(lock: Lock, new: Source, verdicts: list[Verdict]) -> str:
    """The verdicts as Markdown."""
    rows = [
        ("patch", "verdict", "files"),
        *((v.patch.name, v.state, "<br>".join(v.details)) for v in verdicts),
    ]
    todo = {
        "conflict": "edit the patch",
        "already upstream": "drop the patch after its guard test passes without it",
        "offset": "read the result; export rewrites it",
        "clean": "nothing",
    }
    counts = [("verdict", "patches", "what to do")]
    for state, action in todo.items():
        counts.append((state, str(sum(v.state == state for v in verdicts)), action))
    return (
        f"# Patches on vllm {new.version}\n\nFrom vllm {lock.version} to `{new.label}`.\n\n"
        f"{table(counts, markdown=True)}\n\n{table(rows, markdown=True)}\n"
    )


# --- command line ---------------------------------------------------------------------------


def _source(args: argparse.Namespace, lock: Lock) -> Source:
    """The pristine package that --root or --wheel names; a wheel must be the locked one."""
    if args.root:
        return open_root(args.root, lock)
    check_wheel(lock, args.wheel)
    return open_wheel(args.wheel)


def run(args: argparse.Namespace) -> list[str]:
    """Carry out one command; returns the lines to print."""
    if args.command == "lint":
        if problems := lint(args.queue):
            raise CheckFailed(*problems)
        return [f"{len(read_series(args.queue))} patches are in order"]
    if args.command == "export":
        return export(args.queue, args.worktree, args.base) or ["nothing changed"]
    if args.command == "check-wheel":
        return [f"{args.file.name} is the locked {check_wheel(read_lock(args.queue), args.file)}"]
    if args.command == "fetch-wheel":
        lock = read_lock(args.queue)
        if args.package not in lock.wheels:
            raise QueueError(f"--package {args.package} is none of {', '.join(lock.wheels)}")
        file = download(args.package, lock.version, args.dest)
        check_wheel(lock, file)
        return [str(file)]
    queue = read_queue(args.queue)
    if args.command == "apply":
        return [apply_queue(queue, args.root)]
    if args.command == "verify":
        if problems := verify(queue, args.root):
            raise CheckFailed(*problems)
        return [f"{len(queue.lock.files)} patched files are as locked"]
    if args.command == "status":
        return _run_status(queue, args.root)
    if args.command == "lock":
        sources = [open_wheel(w) for w in args.wheel] or [open_root(args.root, queue.lock)]
        lock = make_lock(queue, sources, args.wheel)
        _replace(args.queue / "vllm.lock", lock.dump())
        return [
            f"locked vllm {lock.version}: {len(lock.files)} files; not the same in all wheels: "
            f"{', '.join(lock.differs) or 'none'}"
        ]
    if args.command == "checkout":
        source = _source(args, queue.lock)
        onto = open_wheel(args.onto) if args.onto else None
        checkout(queue, source, args.worktree, onto)
        lines = [f"{args.worktree}: {source.label} and {len(queue.patches)} patches"]
        if onto:
            lines.append(f"next: git rebase --onto {BASE_TAG} {OLD_BASE_TAG}")
        return lines
    return _run_rebase(queue, args)


def _run_status(queue: Queue, root: Path | None) -> list[str]:
    if root:
        check_root(root)
    rows = [("patch", "subject", "files", "+", "-", "state")]
    for p in queue.patches:
        state = patch_state(p, queue.lock, root) if root else ""
        rows.append(
            (p.name, p.subject, str(len(p.files)), str(p.count("+")), str(p.count("-")), state)
        )
    return [f"vllm {queue.lock.version}, {len(queue.patches)} patches", table(rows)]


def _run_rebase(queue: Queue, args: argparse.Namespace) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        if not (args.root or args.from_wheel):
            args.from_wheel = download(PACKAGE, queue.lock.version, Path(name))
        args.wheel, new_wheel = args.from_wheel, args.wheel
        old = _source(args, queue.lock)
        new = open_wheel(new_wheel or download(PACKAGE, args.to, Path(name)))
        if new.version != args.to:
            raise QueueError(f"rebase: --wheel is of version {new.version}, --to says {args.to}")
        verdicts = rebase(queue, old, new)
    if args.report:
        args.report.write_text(rebase_report(queue.lock, new, verdicts))
    rows = [("patch", "verdict", "detail")]
    for v in verdicts:
        rows += [
            (v.patch.name if not i else "", v.state if not i else "", d)
            for i, d in enumerate(v.details)
        ]
    print(table(rows))
    conflicts = [v.patch.name for v in verdicts if v.state == "conflict"]
    if conflicts:
        raise CheckFailed(
            f"{len(conflicts)} of {len(verdicts)} patches conflict with vllm {args.to}: "
            f"{', '.join(conflicts)}"
        )
    return []


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `--help` of each command says what it takes."""
    parser = argparse.ArgumentParser(prog="patchq", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--queue",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="directory with series, vllm.lock and *.patch",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    def one_source(sub: argparse.ArgumentParser, wheel: str, required: bool = True) -> None:
        group = sub.add_mutually_exclusive_group(required=required)
        group.add_argument("--root", type=Path, help="pristine directory that contains vllm/")
        group.add_argument(wheel, type=Path, help="the locked wheel")

    command("lint", "check the patch files, series and vllm.lock against each other")
    for name, text in (
        ("apply", "patch the package below ROOT, all or nothing"),
        ("verify", "compare ROOT with the locked post-images"),
    ):
        command(name, text).add_argument("--root", type=Path, required=True)
    command("status", "list the patches").add_argument("--root", type=Path)
    sub = command("checkout", "make a git repository with one commit per patch")
    one_source(sub, "--wheel")
    sub.add_argument("--worktree", type=Path, required=True)
    sub.add_argument("--onto", type=Path, metavar="WHEEL", help="also prepare a move to this wheel")
    sub = command("export", "write the commits of a checkout back as the queue")
    sub.add_argument("--worktree", type=Path, required=True)
    sub.add_argument("--base", default=BASE_TAG, help=f"commit below the patches ({BASE_TAG})")
    sub = command("lock", "recompute vllm.lock; with --wheel, also set the pin")
    group = sub.add_mutually_exclusive_group(required=True)
    group.add_argument("--root", type=Path, help="pristine directory that contains vllm/")
    group.add_argument("--wheel", type=Path, action="append", default=[], help="may be repeated")
    sub = command("fetch-wheel", "pip download the locked wheel and check it")
    sub.add_argument("--package", default=PACKAGE)
    sub.add_argument("--dest", type=Path, required=True)
    command("check-wheel", "compare a wheel with the locked sha256").add_argument("file", type=Path)
    sub = command("rebase", "say what each patch does on another version; changes nothing")
    sub.add_argument("--to", required=True, metavar="VERSION")
    sub.add_argument("--wheel", type=Path, help="wheel of VERSION; downloaded when not given")
    one_source(sub, "--from-wheel", required=False)
    sub.add_argument("--report", type=Path, help="write Markdown here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    try:
        for line in run(args):
            print(line)
    except QueueError as error:
        for problem in error.problems:
            print(f"patchq {args.command}: {problem}", file=sys.stderr)
        return error.code
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        print(f"patchq {args.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
