"""Runs that end early, meet each other, or find their inputs changed: no work is lost or mixed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kernels.folder_lock import FolderLock
from retrofit import experts, mtp, quantize_base, writing
from retrofit.__main__ import main
from retrofit.errors import BadInput
from retrofit.reading import INDEX, read_header
from tests.retrofit.folders import (
    copy_of,
    digest,
    edit_config,
    edit_tensors,
    write_calibration,
)

ROOT = Path(__file__).parents[2]
OTHERS = "other inputs or options"
# Another process's command that begins to convert, says so, and stays there until it is ended.
ANOTHER = """
import sys, time
from retrofit import __main__, pack
pack.convert = lambda *_: (print("there", flush=True), time.sleep(600))
sys.exit(__main__.main(sys.argv[1:]))
"""


def base_command(original: Path, dst: Path) -> list[str]:
    """Several shards, of 306 weights."""
    return ["quantize-base", str(original), str(dst), "--scale", "absmax",
            "--shard-bytes", "4000000"]  # fmt: skip


def head_command(original: Path, base: Path, dst: Path) -> list[str]:
    return ["mtp", str(original), str(base), str(dst), "--rtn"]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory, original, base) -> Path:
    """What `head_command` writes."""
    dst = tmp_path_factory.mktemp("rounded") / "rtn"
    assert main(head_command(original, base, dst)) == 0
    return dst


@pytest.fixture(scope="module")
def shards(tmp_path_factory, original) -> Path:
    """What `base_command` writes."""
    dst = tmp_path_factory.mktemp("shards") / "base"
    assert main(base_command(original, dst)) == 0
    return dst


def stop_at(call: int, real, calls: list | None = None):
    """`real`, until that call of it is an interrupt."""
    calls = [] if calls is None else calls

    def step(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    return step


def error_line(capsys) -> str:
    return [li for li in capsys.readouterr().err.splitlines() if li.startswith("retrofit: ")][-1]


# ------------------------------------------------------------------------------- two at once


def test_a_second_run_names_the_first_and_touches_nothing(original, shards, tmp_path, capsys):
    """Also when the first is killed: what it leaves is continued, and no lock is in the result."""
    dst = tmp_path / "dst"
    partial = tmp_path / "dst.partial"
    command = base_command(original, dst)
    first = subprocess.Popen(
        [sys.executable, "-c", ANOTHER, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert first.stdout.readline() == "there\n"
        before = digest(partial)
        assert main(command) == 2
        line = error_line(capsys)
        assert f"{partial}: is held by process {first.pid} on" in line
        assert digest(partial) == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert main(command) == 0
    assert digest(dst) == digest(shards)
    assert list(tmp_path.iterdir()) == [dst]


def test_a_head_is_made_by_one_run_at_a_time(original, base, rounded, tmp_path, monkeypatch):
    """The second ends in the middle of the first, which does not notice."""
    dst, statuses = tmp_path / "dst", []
    write_part = mtp.write_part

    def another(*arguments) -> None:
        if not statuses:
            statuses.append(None)
            statuses.append(main(head_command(original, base, dst)))
        write_part(*arguments)

    monkeypatch.setattr(mtp, "write_part", another)
    assert main(head_command(original, base, dst)) == 0
    assert statuses == [None, 2]
    assert digest(dst) == digest(rounded)


def test_a_folder_that_was_replaced_meanwhile_is_not_given_the_name(
    original, tmp_path, monkeypatch, capsys
):
    dst, partial = tmp_path / "dst", tmp_path / "dst.partial"

    def replace(_: object) -> dict:
        shutil.rmtree(partial)
        partial.mkdir()
        return {}

    monkeypatch.setattr(quantize_base, "base_config", replace)
    assert main(base_command(original, dst)) == 2
    assert "was moved or removed while this run worked in it" in error_line(capsys)
    assert not dst.exists()


@pytest.mark.parametrize("unlocked", ["before", "after"])
def test_a_run_that_ends_while_the_next_one_looks_is_not_begun_again(
    unlocked, original, tmp_path, monkeypatch, capsys
):
    """The first gives the folder its name just before, or just after the second locks it."""
    dst, partial = tmp_path / "dst", tmp_path / "dst.partial"

    def lock(folder: Path, *arguments: str) -> FolderLock:
        if unlocked == "after":
            held = FolderLock(folder, *arguments)
        partial.rename(dst)
        if unlocked == "before":
            partial.mkdir()
            held = FolderLock(folder, *arguments)
        return held

    monkeypatch.setattr(writing, "FolderLock", lock)
    assert main(base_command(original, dst)) == 2
    said = {"before": "dst: exists", "after": "another run ended in it just now"}
    assert said[unlocked] in error_line(capsys)
    assert list(tmp_path.iterdir()) == [dst]


def test_a_run_that_is_refused_while_the_next_one_looks_is_told(
    original, tmp_path, monkeypatch, capsys
):
    """The first removes the folder before the second locks it."""
    dst = tmp_path / "dst"

    def lock(folder: Path, *arguments: str) -> FolderLock:
        folder.rmdir()
        return FolderLock(folder, *arguments)

    monkeypatch.setattr(writing, "FolderLock", lock)
    assert main(base_command(original, dst)) == 2
    assert "another run ended in it just now; start the command again" in error_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_what_was_renamed_is_none_of_the_folder(tmp_path):
    (tmp_path / "a").mkdir()
    lock = FolderLock(tmp_path / "a", "us")
    assert lock.stands()
    (tmp_path / "a").rename(tmp_path / "b")
    assert not lock.stands()
    (tmp_path / "a").mkdir()
    another = FolderLock(tmp_path / "a", "them")
    assert another.stands()
    assert not lock.stands()
    for held in (lock, another):
        held.release()


# -------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("where", ["rename", "unlink", "rmtree"])
def test_an_end_that_is_interrupted_is_continued(
    where, original, base, rounded, tmp_path, monkeypatch, capsys
):
    """Nothing is quantized again, whether the result has its name already or not."""
    dst = tmp_path / "dst"
    command = head_command(original, base, dst)
    place = shutil if where == "rmtree" else Path
    real = getattr(place, where)

    def interrupt(path: Path, *arguments, **options):
        if where == "rename" or Path(path) in (dst / "parts", dst / writing.STATE):
            raise KeyboardInterrupt
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, where, interrupt)
        assert main(command) == 130
    calls: list = []
    monkeypatch.setattr(mtp, "write_part", lambda *a: calls.append(a))
    assert main(command) == 0
    assert calls == []
    assert digest(dst) == digest(rounded)
    assert list(tmp_path.iterdir()) == [dst]
    assert main(command) == 2
    assert "dst: exists" in error_line(capsys)


def test_a_name_that_was_taken_meanwhile_costs_no_work(
    original, shards, tmp_path, monkeypatch, capsys
):
    dst, real = tmp_path / "dst", quantize_base.base_config

    def take(config: dict) -> dict:
        dst.mkdir(exist_ok=True)
        (dst / "x").touch()
        return real(config)

    with monkeypatch.context() as patch:
        patch.setattr(quantize_base, "base_config", take)
        assert main(base_command(original, dst)) == 2
    dst.rename(tmp_path / "other")
    calls: list = []
    monkeypatch.setattr(quantize_base.pack, "convert", lambda *a: calls.append(a))
    assert main(base_command(original, dst)) == 0
    assert calls == []
    assert digest(dst) == digest(shards)


def test_a_folder_from_before_the_first_file_is_new(original, shards, tmp_path):
    dst, partial = tmp_path / "dst", tmp_path / "dst.partial"
    partial.mkdir()
    for name in (writing.LOCK, f".{writing.STATE}.part"):
        (partial / name).touch()
    assert main(base_command(original, dst)) == 0
    assert digest(dst) == digest(shards)


def test_a_folder_of_something_else_is_left_as_it_is(original, tmp_path, capsys):
    partial = tmp_path / "dst.partial"
    partial.mkdir()
    (partial / "x").touch()
    assert main(base_command(original, tmp_path / "dst")) == 2
    assert OTHERS in error_line(capsys)
    assert [path.name for path in partial.iterdir()] == ["x"]


# ---------------------------------------------------------------------- bad input, found late


def test_a_late_refusal_keeps_the_shards_before_it(original, tmp_path, monkeypatch, capsys):
    source, dst = copy_of(original, tmp_path / "source"), tmp_path / "dst"
    nan = float("nan")
    edit_tensors(source, "head.weight", lambda v: v["head.weight"][0].fill_(nan))
    assert main(base_command(source, dst)) == 2
    partial = tmp_path / "dst.partial"
    line = error_line(capsys)
    assert "head.weight holds NaN" in line
    assert line.endswith(f"what was done before is kept in {partial}")
    kept = list(partial.glob("*.safetensors"))
    assert kept
    calls: list = []
    monkeypatch.setattr(quantize_base.pack, "convert", stop_at(10**6, quantize_base.pack.convert,
                                                               calls))  # fmt: skip
    assert main(base_command(source, dst)) == 2
    assert 0 < len(calls) < 150
    assert list(partial.glob("*.safetensors")) == kept


def test_a_refusal_before_the_first_shard_leaves_nothing(original, tmp_path):
    source, dst = copy_of(original, tmp_path / "source"), tmp_path / "dst"
    nan = float("nan")
    edit_tensors(source, "embed.weight", lambda v: v["embed.weight"][0].fill_(nan))
    assert main(base_command(source, dst)) == 2
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
def test_a_step_that_cannot_be_read_is_done_again(
    ending, original, base, rounded, tmp_path, monkeypatch
):
    """As after a power cut."""
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch:
        patch.setattr(mtp, "write_part", stop_at(9, mtp.write_part))
        assert main(head_command(original, base, dst)) == 130
    (tmp_path / "dst.partial" / "parts" / f"experts-00002{ending}").write_text("")
    calls: list = []
    monkeypatch.setattr(mtp, "write_part", stop_at(10**6, mtp.write_part, calls))
    assert main(head_command(original, base, dst)) == 0
    assert [step.start for _, step, _ in calls] == [2, *range(8, 16)]
    assert digest(dst) == digest(rounded)


def test_json_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events: list[str] = []
    real = writing.os.fsync
    monkeypatch.setattr(writing.os, "fsync", lambda fd: (events.append("fsync"), real(fd)))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    writing.write_json(tmp_path / "x.json", {"a": 1})
    assert events == ["fsync", "replace"]
    assert (tmp_path / "x.json").read_text() == '{\n "a": 1\n}\n'


def test_what_only_vllm_refuses_is_found_before_the_work(
    original, base, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("vllm")
    folder = copy_of(base, tmp_path / "base")
    monkeypatch.setattr(mtp, "quantize", lambda *_: pytest.fail("the work began"))

    def another_strategy(config: dict) -> None:
        group = config["quantization_config"]["config_groups"]["attention"]
        group["input_activations"]["strategy"] = "bogus"

    edit_config(folder, another_strategy)
    assert main(head_command(original, folder, tmp_path / "dst")) == 2
    assert "refuses quantization_config" in error_line(capsys)
    assert list(tmp_path.iterdir()) == [folder]


# -------------------------------------------------------------------------- changed inputs


def negate(folder: Path, name: str) -> Path:
    """Other values of a BF16 tensor under the same header; which file that is."""
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    data = bytearray(path.read_bytes())
    entry = read_header(path)[name]
    assert entry.dtype == "BF16"
    for place in range(entry.start + 1, entry.start + entry.num_bytes, 2):
        data[place] ^= 0x80
    path.unlink()
    path.write_bytes(data)
    return path


def test_other_values_under_the_same_headers_are_not_mixed_in(
    original, tmp_path, monkeypatch, capsys
):
    source, dst = copy_of(original, tmp_path / "source"), tmp_path / "dst"
    with monkeypatch.context() as patch:
        patch.setattr(quantize_base.pack, "convert", stop_at(150, quantize_base.pack.convert))
        assert main(base_command(source, dst)) == 130
    changed = negate(source, "norm.weight")
    assert main(base_command(source, dst)) == 2
    assert f"retrofit: {changed}: has changed since" in error_line(capsys)


@pytest.mark.parametrize("which", ["original", "base", "rows"])
def test_a_head_is_not_continued_with_other_values(
    which, original, base, tmp_path, monkeypatch, capsys
):
    inputs = [copy_of(original, tmp_path / "original"), copy_of(base, tmp_path / "base")]
    rows = write_calibration(tmp_path / "rows")
    command = ["mtp", *map(str, inputs), str(tmp_path / "dst"), "--calibration", str(rows)]
    with monkeypatch.context() as patch:
        patch.setattr(experts, "quantize_experts", stop_at(1, None))
        assert main(command) == 130
    if which == "rows":
        meta = (rows / "meta.json").read_bytes()
        changed = rows / "rows-00001.safetensors"
        values = load_file(changed)
        save_file({**values, "hidden": values["hidden"] * 3}, changed)
        assert (rows / "meta.json").read_bytes() == meta
    else:
        folder, name = (inputs[0], "mtp.0.norm.weight"), (inputs[1], "norm.weight")
        changed = negate(*(folder if which == "original" else name))
    assert main(command) == 2
    assert f"retrofit: {changed}: has changed since" in error_line(capsys)


def test_a_shard_without_the_head_may_come_and_go(original, base, tmp_path, monkeypatch):
    part = copy_of(original, tmp_path / "part")
    names = json.loads((part / INDEX).read_text())["weight_map"]
    holding = {shard for name, shard in names.items() if name.startswith("mtp.")}
    other = part / min(set(names.values()) - holding)
    other.rename(tmp_path / "later")
    command = head_command(part, base, tmp_path / "dst")
    with monkeypatch.context() as patch:
        patch.setattr(mtp, "write_part", stop_at(3, mtp.write_part))
        assert main(command) == 130
    (tmp_path / "later").rename(other)
    assert main(command) == 0


def test_small_files_are_those_of_the_last_run(original, base, tmp_path, monkeypatch):
    folder, dst = copy_of(base, tmp_path / "base"), tmp_path / "dst"
    with monkeypatch.context() as patch:
        patch.setattr(mtp, "write_part", stop_at(3, mtp.write_part))
        assert main(head_command(original, folder, dst)) == 130
    (folder / "tokenizer.json").write_text("{}")
    assert main(head_command(original, folder, dst)) == 0
    assert (dst / "tokenizer.json").read_text() == "{}"


# -------------------------------------------------------------------------------- headers


def spans(*offsets: tuple[int, int]) -> bytes:
    """A file of int8 vectors at these places, and the bytes up to the last."""
    header = {
        f"t{number}": {"dtype": "I8", "shape": [end - start], "data_offsets": [start, end]}
        for number, (start, end) in enumerate(offsets)
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(max(end for _, end in offsets))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([(0, 4), (2, 6)], "t1 begins at byte 2 of the data, and 4 are before it"),
        ([(0, 4), (0, 4)], "t1 begins at byte 0 of the data, and 4 are before it"),
        ([(0, 4), (6, 8)], "t1 begins at byte 6 of the data, and 4 are before it"),
        ([(1, 4)], "t0 begins at byte 1 of the data, and 0 are before it"),
        ([(0, 4), (4, 4), (4, 6)], None),
        ([(4, 6), (0, 4)], None),
    ],
)
def test_a_header_is_sound_where_safetensors_takes_it(offsets, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(spans(*offsets))
    if message is None:
        assert len(read_header(path)) == len(load_file(path)) == len(offsets)
        return
    with pytest.raises(Exception, match="InvalidOffset|offset"):
        load_file(path)
    with pytest.raises(BadInput, match=message):
        read_header(path)
