"""A folder is held by one process, and by nobody once that process is gone, however it went."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.folder_lock import CLIENT, SERVER, FolderHeld, FolderLock, check_free

ROOT = Path(__file__).parents[2]
# Takes the folder, forks a child that lives on, says so, and waits to be killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from kernels.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), "a test")
if not os.fork():
    print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """(process that holds tmp_path, id of its child)."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        yield process, child
        process.kill()
        os.kill(child, signal.SIGKILL)


def test_a_held_folder_is_refused_and_its_holder_named(tmp_path):
    lock = FolderLock(tmp_path, "serves X")
    for attempt in (lambda: FolderLock(tmp_path, "serves Y"), lambda: check_free(tmp_path)):
        with pytest.raises(FolderHeld, match=rf"^process {os.getpid()} on .+ \(serves X\)$"):
            attempt()
    lock.release()
    check_free(tmp_path)
    FolderLock(tmp_path, "serves Z").release()
    assert (tmp_path / SERVER).read_text().count("process") == 1


def test_a_killed_holder_leaves_the_folder_free_though_its_child_lives(tmp_path, holder):
    process, child = holder
    with pytest.raises(FolderHeld, match=f"process {process.pid} on"):
        FolderLock(tmp_path, "us")
    process.kill()
    process.wait()
    os.kill(child, 0)  # is there
    FolderLock(tmp_path, "us").release()


def test_a_server_and_its_client_hold_a_folder_together(tmp_path):
    locks = [FolderLock(tmp_path, "us", name) for name in (SERVER, CLIENT)]
    with pytest.raises(FolderHeld):
        FolderLock(tmp_path, "another", CLIENT)
    for lock in locks:
        lock.release()


def test_to_look_whether_a_folder_is_free_leaves_nothing_in_it(tmp_path):
    check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        FolderLock(tmp_path / "absent", "us")
