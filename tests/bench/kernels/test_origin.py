"""A result names no folder of the machine that it comes from."""

import hashlib

from bench.kernels import origin


def test_of_an_absolute_path_the_last_name_is_kept():
    line = origin.command_line(
        ["/opt/venv/bin/python3", "-m", "bench.kernels", "--marlin", "/data/x/_moe_C.so",
         "--out=/data/a.json", "--tokens", "1,2"]
    )  # fmt: skip
    assert line == ("python3 -m bench.kernels --marlin _moe_C.so --out=a.json --tokens 1,2")


def test_a_library_is_known_by_its_hash(tmp_path):
    path = tmp_path / "a.so"
    path.write_bytes(b"elf")
    assert origin.file_sha256(path) == hashlib.sha256(b"elf").hexdigest()
