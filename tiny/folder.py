"""The folder of a checkpoint: written beside its place, then renamed into it.

Only what `tiny` writes is ever replaced: a folder with any other file in it is refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny.tokenizer import FILES as TOKENIZER_FILES

NUM_SHARDS = 2
SHARDS = tuple(f"model-{i + 1:05d}-of-{NUM_SHARDS:05d}.safetensors" for i in range(NUM_SHARDS))
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
WRITTEN = frozenset((CONFIG, INDEX, *SHARDS, *TOKENIZER_FILES))


def check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything but files that `tiny` writes.

    Raises:
        ValueError: it does, or it is the working directory or not a folder.
        OSError: it cannot be listed.
    """
    folder = folder.resolve()
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"export: {folder} is a file; name another folder")
    if folder == Path.cwd():
        raise ValueError(f"export: {folder} is the working directory; name a folder in it")
    with os.scandir(folder) as entries:
        foreign = sorted(
            entry.name
            for entry in entries
            if entry.name not in WRITTEN or not entry.is_file(follow_symlinks=False)
        )
    if foreign:
        raise ValueError(
            f"export: {folder} holds {foreign[0]}, which export does not write and would remove; "
            "name another folder, or move that away"
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder to write into, which takes the place of `folder` at the end of the block.

    Files that only the old one has are dropped. After an error the old one is as it was. What a
    killed run leaves, `FOLDER.export-*` beside it, is in nobody's way; when it was killed between
    the two renames, the old one is in there.

    Args:
        folder: made with its parents, or replaced; of a link, what it leads to.
    Raises:
        ValueError, OSError: as `check_replaceable`, before and after the block.
    """
    check_replaceable(folder)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.export-", dir=folder.parent))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()  # `work` itself is its owner's alone
        yield new
        check_replaceable(folder)  # writing took a while
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(work)
