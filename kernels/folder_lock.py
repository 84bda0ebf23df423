"""A folder that one process holds at a time, told by the operating system.

The lock is a `flock` on a file in the folder: the system frees it however its holder ends, so what
a killed process leaves is an unlocked file, and no lock is ever stale. The file says who holds it.
Standard library only: it is also asked for where no engine is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

# Who may hold a folder, one of each: who records into it, and who says when.
SERVER, CLIENT = "server.lock", "client.lock"
LONGEST_HOLDER = 4096


class FolderHeld(RuntimeError):
    """Another process holds the folder; the message is the holder's own description."""


class FolderLock:
    """Holds a folder until `release`, or until this process ends.

    Args:
        folder: exists, and can be written to.
        purpose: what the holder does; it is told to those who come later.
        name: of the file: SERVER or CLIENT.
    Raises:
        FolderHeld: another process, or another lock of this one, holds it.
        OSError: the file cannot be made or locked.
    """

    def __init__(self, folder: Path, purpose: str, name: str = SERVER) -> None:
        self._path = folder / name
        # Not "w": the holder's description must stay where it is held.
        self._file = self._path.open("a+", encoding="utf-8")
        _lock(self._file)
        # A child that is forked later has the same lock, and would keep it when this process ends.
        os.register_at_fork(after_in_child=self._file.close)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} ({purpose})\n")
        self._file.flush()

    def stands(self) -> bool:
        """Whether the folder of this name is still the one held: not renamed, removed, made anew.

        Raises:
            OSError: the file cannot be looked at.
        """
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        return False

    def release(self) -> None:
        """Give the folder up. The file stays: to remove it would let two processes hold it."""
        self._file.close()


def check_free(folder: Path) -> None:
    """Whether a server's lock could be had now; it is not kept.

    Raises:
        FolderHeld, OSError: as `FolderLock`.
    """
    with contextlib.suppress(FileNotFoundError), (folder / SERVER).open(encoding="utf-8") as file:
        _lock(file)


def _lock(file: TextIO) -> None:
    """Lock an open file, or close it and raise as `FolderLock` does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read(LONGEST_HOLDER).strip()
        file.close()
        if isinstance(error, BlockingIOError):
            raise FolderHeld(holder or "another process") from None
        raise
