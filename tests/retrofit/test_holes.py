"""Parts of files that were never written are found by every command, without reading them."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrofit.__main__ import main
from retrofit.holes import hole_faults, holes
from retrofit.reading import open_checkpoint
from tests.retrofit.folders import copy_of, write_calibration

BLOCK = 4096  # bytes, the least that ext4, XFS and tmpfs leave out
TRUNK = "layers.1.ffn.experts.3.w2.weight_packed"
HEAD = "mtp.0.ffn.experts.7.w2.weight"


def leave_out(path: Path, start: int, end: int) -> None:
    """Write the file again but for these bytes (never through a hard link)."""
    data = path.read_bytes()
    path.unlink()
    with path.open("wb") as file:
        file.write(data[:start])
        file.seek(end)
        file.write(data[end:])
        file.truncate(len(data))
    if not list(holes(path)):
        pytest.skip("this file system keeps no holes")


def broken(folder: Path, target: Path, name: str) -> tuple[Path, str]:
    """A copy without two blocks of a tensor, and the message about it."""
    copy = copy_of(folder, target)
    entry = open_checkpoint(copy, partial=True).entries[name]
    start = -(-entry.start // BLOCK) * BLOCK
    end = start + 2 * BLOCK
    assert end <= entry.start + entry.num_bytes
    leave_out(entry.path, start, end)
    return copy, f"{entry.path}: bytes {start} to {end} were never written: {name}"


def test_holes_are_told_by_first_byte_and_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10 * BLOCK)
    assert list(holes(path)) == []
    leave_out(path, 2 * BLOCK, 5 * BLOCK)
    assert list(holes(path)) == [(2 * BLOCK, 5 * BLOCK)]
    leave_out(path, 7 * BLOCK, 10 * BLOCK)
    assert list(holes(path))[-1] == (7 * BLOCK, 10 * BLOCK)
    path.write_bytes(b"")
    assert list(holes(path)) == []


def test_verify_names_a_hole_in_the_packed_words_of_the_trunk(good, tmp_path, capsys):
    folder, message = broken(good, tmp_path / "broken", TRUNK)
    assert main(["verify", str(folder)]) == 1
    assert f"fault: {message}\n" in capsys.readouterr().out


@pytest.mark.parametrize("which", ["source", "base"])
def test_mtp_refuses_inputs_with_holes(which, original, base, tmp_path, capsys):
    folders = {"source": original, "base": base}
    name = HEAD if which == "source" else TRUNK
    folders[which], message = broken(folders[which], tmp_path / "broken", name)
    rows = write_calibration(tmp_path / "rows")
    arguments = ["mtp", *map(str, folders.values()), str(tmp_path / "dst")]
    assert main([*arguments, "--calibration", str(rows)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "rows"]


def test_quantize_base_refuses_a_source_with_a_hole(original, tmp_path, capsys):
    folder, message = broken(original, tmp_path / "broken", "layers.2.ffn.experts.3.w1.weight")
    assert main(["quantize-base", str(folder), str(tmp_path / "dst")]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_one_line_counts_the_tensors_of_a_file(original, tmp_path):
    folder = copy_of(original, tmp_path / "broken")
    entries = open_checkpoint(folder).entries.values()
    path = max((e.path for e in entries), key=lambda p: p.stat().st_size)
    inside = [e for e in entries if e.path == path and e.dtype != "F32"]
    leave_out(path, BLOCK * (1 + min(e.start for e in inside) // BLOCK), path.stat().st_size)
    [line] = hole_faults(entries)
    assert line.endswith(f" and {len(inside) - 1} other tensors")
