"""Places, permissions, disks, options that cannot be: one line, status 2, nothing left behind."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.capture import Recorder
from retrofit import mtp, writing
from retrofit.__main__ import main
from retrofit.control import CONTROL, STATUS, Action, Order, read_answer, write
from retrofit.errors import BadInput
from retrofit.reading import CONFIG
from tests.retrofit.folders import calibration_rows, copy_of, digest, edit_config

ROOT = Path(__file__).parents[2]
SMALL = "tokenizer.json"


def refusal(arguments: list, capsys) -> str:
    """The one line that a command is refused with."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    found = [line for line in lines if line.startswith("retrofit: ")]
    assert len(found) == 1, lines
    return found[0]


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


@pytest.fixture
def no_privilege():
    """Root may read and write everything: lay that power down for the test."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(0x20080522, 0), (_Capabilities * 2)()
    if libc.capget(ctypes.byref(header), sets):
        pytest.skip("no capabilities here")
    before = sets[0].effective
    sets[0].effective &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(ctypes.byref(header), sets) == 0
    yield
    sets[0].effective = before
    assert libc.capset(ctypes.byref(header), sets) == 0


# ------------------------------------------------------------------------------- permissions


def test_a_folder_that_may_not_be_listed_is_not_called_empty(base, tmp_path, no_privilege, capsys):
    folder = copy_of(base, tmp_path / "closed")
    folder.chmod(0o300)
    for command in ("inspect", "verify"):
        assert refusal([command, folder], capsys) == f"retrofit: {folder}: Permission denied"
    folder.chmod(0o700)


@pytest.mark.parametrize("name", [CONFIG, "model-00001-of-00001.safetensors", SMALL])
def test_a_file_that_may_not_be_read_is_named_before_any_work(
    name, original, base, tmp_path, no_privilege, capsys
):
    folder = copy_of(base, tmp_path / "base")
    data = (folder / name).read_bytes()
    (folder / name).unlink()  # it may be a hard link
    (folder / name).write_bytes(data)
    (folder / name).chmod(0)
    line = refusal(["mtp", original, folder, tmp_path / "dst", "--rtn"], capsys)
    assert f"{folder / name}: Permission denied" in line
    assert list(tmp_path.iterdir()) == [folder]


def test_quantize_base_names_a_small_file_before_any_work(original, tmp_path, no_privilege, capsys):
    folder = copy_of(original, tmp_path / "original")
    (folder / SMALL).chmod(0)
    line = refusal(["quantize-base", folder, tmp_path / "dst"], capsys)
    assert line == f"retrofit: {folder / SMALL}: Permission denied"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_place_that_may_not_be_written_is_named(original, base, tmp_path, no_privilege, capsys):
    place = tmp_path / "closed"
    place.mkdir(mode=0o500)
    for arguments in (["mtp", original, base, place / "d", "--rtn"],
                      ["quantize-base", original, place / "d"]):  # fmt: skip
        assert "closed/d.partial: Permission denied" in refusal(arguments, capsys)
    assert list(place.iterdir()) == []


# ------------------------------------------------------------------------- places of results


@pytest.mark.parametrize("dst", ["/", "."])
def test_a_place_without_a_name_is_refused(dst, original, base, capsys):
    for arguments in (["mtp", original, base, dst, "--rtn"], ["quantize-base", original, dst]):
        assert refusal(arguments, capsys).startswith(f"retrofit: {dst}: exists")


def test_a_link_to_nothing_is_refused_before_any_work(original, base, tmp_path, capsys):
    dst = tmp_path / "dst"
    dst.symlink_to(tmp_path / "nowhere")
    assert "dst: exists" in refusal(["mtp", original, base, dst, "--rtn"], capsys)
    assert list(tmp_path.iterdir()) == [dst]


def test_the_calibration_folder_is_only_read(original, base, calibration, capsys):
    before = digest(calibration)
    dst = calibration / "dst"
    line = refusal(["mtp", original, base, dst, "--calibration", calibration], capsys)
    assert line.endswith("which is only read")
    assert digest(calibration) == before


# ------------------------------------------------------------------------------ full disks


def fill(monkeypatch, after: int = 0) -> None:
    """The disk is full once so many files are on it."""
    files = []

    def full(file: int) -> None:
        files.append(file)
        if len(files) > after:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)


@pytest.mark.parametrize("after", [0, 1, 6], ids=["state", "first record", "third step"])
def test_a_full_disk_is_one_line_and_the_same_command_continues(
    after, original, base, calibration, good, tmp_path, monkeypatch, capsys
):
    dst = tmp_path / "dst"
    arguments = ["mtp", original, base, dst, "--calibration", calibration]
    with monkeypatch.context() as patch:
        fill(patch, after)
        assert refusal(arguments, capsys) == f"retrofit: {dst}: No space left on device"
    assert not dst.exists()
    assert [path for path in tmp_path.rglob("*") if path.name.endswith(".part")] == []
    assert main([str(argument) for argument in arguments]) == 0
    assert digest(dst) == digest(good)


def test_tensors_that_do_not_fit_are_an_os_error_and_leave_nothing(tmp_path):
    """Nothing in between makes another kind of it, which would end a server that captures."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            writing.write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_server_outlives_a_disk_that_fills_up(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path, {"hidden_size": 256})
    write(tmp_path / CONTROL, Order("1", Action.BEGIN, 10**9))
    recorder.obey()
    recorder._writer.rows_per_file = 4
    fill(monkeypatch)
    recorder.append(*calibration_rows(5))
    assert not recorder.recording
    write(tmp_path / CONTROL, Order("2", Action.COMMIT, 10**9))
    recorder.obey()
    assert "No space left on device" in read_answer(tmp_path).error


# ---------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"o_groups": 0}, "o_groups = 0; a positive number is needed"),
        ({"vocab_size": True}, "vocab_size = True; a positive number is needed"),
        ({"compress_ratios": [0, "4", 128, 4, 0]}, "'4', 128, 4, 0]; numbers are needed"),
    ],
)
def test_sizes_that_are_none_are_named_with_their_file(
    values, message, original, base, tmp_path, capsys
):
    folder = copy_of(original, tmp_path / "source")
    edit_config(folder, lambda c: c.update(values))
    for arguments in (["quantize-base", folder, tmp_path / "d"],
                      ["mtp", folder, base, tmp_path / "d", "--rtn"],
                      ["verify", base, "--deep", folder]):  # fmt: skip
        line = refusal(arguments, capsys)
        assert line.startswith(f"retrofit: {folder / CONFIG}: ")
        assert message in line
    for command in ("verify", "inspect"):
        assert main([command, str(folder)]) == 1
        assert message in capsys.readouterr().out


def test_a_limit_that_is_no_number_is_refused(original, base, calibration, tmp_path, capsys):
    folder = copy_of(base, tmp_path / "base")
    edit_config(folder, lambda c: c.update(swiglu_limit="ten"))
    dst = tmp_path / "dst"
    line = refusal(["mtp", original, folder, dst, "--calibration", calibration], capsys)
    assert line == "retrofit: config.json: swiglu_limit = 'ten'; a number is needed"


def test_a_damping_that_is_no_number_is_refused(original, base, calibration, tmp_path, capsys):
    arguments = ["mtp", original, base, tmp_path / "dst", "--calibration", calibration]
    assert "percdamp = nan" in refusal([*arguments, "--percdamp", "nan"], capsys)
    assert mtp.MtpConfig(original, base, tmp_path).percdamp == 0.01


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--budget-gib", "nan", "budget_gib = nan; must be positive and finite"),
        ("--budget-gib", "inf", "budget_gib = inf; must be positive and finite"),
        ("--url", "http://", "url = 'http://'; must be http://HOST:PORT"),
        ("--url", "http://127.0.0.1:x", "url = 'http://127.0.0.1:x'; must be http://HOST:PORT"),
        ("--url", "ftp://x", "url = 'ftp://x'; must be http://HOST:PORT"),
        ("--out", "nowhere", "nowhere: no such folder; `serve run --capture` makes it"),
        ("--prompts", "/dev/null", "/dev/null: 0 prompts"),
    ],
)
def test_options_of_capture_that_cannot_be(option, value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = {"--url": "http://127.0.0.1:1", "--out": ".", option: value}
    arguments = ["capture", *(word for pair in options.items() for word in pair)]
    assert message in refusal(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_are_no_text_are_refused(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b'{"text": "\xff"}')
    arguments = ["capture", "--url", "http://127.0.0.1:1", "--out", tmp_path, "--prompts", prompts]
    assert f"{prompts}: not UTF-8" in refusal([*arguments, "--num-prompts", "1"], capsys)


def test_a_folder_of_another_program_is_refused_by_capture(tmp_path, capsys):
    meta = {"schema_version": 1, "num_rows": 0, "num_files": 0, "prompts_done": 5}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    line = refusal(["capture", "--url", "http://127.0.0.1:1", "--out", tmp_path], capsys)
    assert line.endswith("meta.json: prompts_done is no list of ids")


# ------------------------------------------------------------------------------ other ends


@pytest.mark.parametrize("reply", [b"[]", b"{}", b'{"data": []}'])
def test_a_server_that_is_none_of_ours_is_named(reply, tmp_path, monkeypatch, capsys):
    import io
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(reply))
    line = refusal(["capture", "--url", "http://other", "--out", tmp_path], capsys)
    assert "http://other/v1/models: lists no model" in line


def test_an_answer_that_is_none_is_named(tmp_path):
    from retrofit.capture import CaptureConfig, Server

    (tmp_path / STATUS).write_text('{"request": 1}')
    server = Server.__new__(Server)
    server.config = CaptureConfig("http://x", tmp_path)
    with pytest.raises(BadInput, match=r"status\.json: no answer of ours"):
        server.order(Action.STOP)


def test_an_output_that_nobody_reads_ends_quietly(base):
    """As in `retrofit inspect BASE | head`, whichever of the two ends first."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "retrofit", "inspect", str(base)],
        cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr.splitlines()[1:] == []  # the options alone


def test_values_of_options_are_shown_as_they_are_typed(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["quantize-base", "a", "b", "--scale", "best"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert "absmax" in line
    assert "Scale." not in line
