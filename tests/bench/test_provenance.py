import hashlib
from pathlib import Path

import pytest

from bench import provenance


@pytest.mark.parametrize(
    ("value", "kept"),
    [(Path("/repo/tiny/checkpoint"), "tiny/checkpoint"), (Path("/home/me/model"), "model"), (3, 3)],
)
def test_a_setting_names_no_folder_of_the_machine(value, kept):
    assert provenance.recorded(value, Path("/repo")) == kept


def test_the_series_hash_follows_the_order_and_the_content(tmp_path):
    (tmp_path / "a.patch").write_text("A")
    (tmp_path / "b.patch").write_text("B")
    (tmp_path / "series").write_text("b.patch  # first\na.patch\n")
    series = (tmp_path / "series").read_bytes()
    assert provenance.series_sha256(tmp_path) == hashlib.sha256(series + b"BA").hexdigest()


def test_the_checkpoint_hash_is_of_config_and_shards_and_of_nothing_else(tmp_path):
    (tmp_path / "model.safetensors").write_text("2")
    (tmp_path / "config.json").write_text("1")
    (tmp_path / "tokenizer.json").write_text("3")
    expected = hashlib.sha256(b"config.json\x001model.safetensors\x002").hexdigest()
    assert provenance.checkpoint_sha256(tmp_path) == expected


def test_the_device_is_the_cpus_name(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\n")
    assert provenance.cpu_model(cpuinfo) == "A CPU @ 2 GHz"


def test_outside_a_repository_there_is_no_commit(tmp_path):
    assert provenance._git(tmp_path, "rev-parse", "HEAD") is None


def test_of_an_absolute_path_the_last_name_is_kept(tmp_path):
    line = provenance.command_line(
        ["/opt/venv/bin/python3", "-m", "bench.kernels", "--marlin", "/data/x/_moe_C.so",
         "--out=/data/a.json", "--tokens", "1,2"], tmp_path,
    )  # fmt: skip
    assert line == ("python3 -m bench.kernels --marlin _moe_C.so --out=a.json --tokens 1,2")


def test_the_recorded_command_names_no_folder(tmp_path):
    command = ["python", "-m", "bench", "--result", "/home/me/a.json", "--tokenizer=/srv/tok"]
    recorded = provenance.command_line(command, tmp_path)
    assert recorded == "python -m bench --result a.json --tokenizer=tok"
