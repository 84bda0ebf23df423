"""Parts of a checkpoint's files that were never written, such as a download that stopped leaves.

A file whose length was reserved in advance reads as zeros there, and its header is right. The file
system knows these parts without reading a byte; one that does not, reports none.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from retrofit.reading import Entry


def hole_faults(entries: Iterable[Entry]) -> list[str]:
    """One line per file with a hole in a tensor whose values cannot be zeros."""
    faults = []
    for path, group in groupby(sorted(entries, key=lambda e: (e.path, e.start)), lambda e: e.path):
        # FP32 tensors are biases and mixers, some of which may be zero.
        tensors = [entry for entry in group if entry.dtype != "F32"]
        found = [
            (start, end, entry.name)
            for start, end in holes(path)
            for entry in tensors
            if start < entry.start + entry.num_bytes and entry.start < end
        ]
        if found:
            start, end, name = found[0]
            others = len({name for _, _, name in found}) - 1
            more = f" and {others} other tensors" if others else ""
            faults.append(f"{path}: bytes {start} to {end} were never written: {name}{more}")
    return faults


def holes(path: Path) -> Iterator[tuple[int, int]]:
    """First byte and end of each hole."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        end = 0
        while end < size and (start := os.lseek(file.fileno(), end, os.SEEK_HOLE)) < size:
            try:
                end = os.lseek(file.fileno(), start, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # no data behind it
                    raise
                end = size
            yield start, end
