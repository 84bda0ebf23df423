"""What a kernel benchmark records of its libraries."""

import hashlib

from bench.kernels import origin


def test_a_library_is_known_by_its_hash(tmp_path):
    path = tmp_path / "a.so"
    path.write_bytes(b"elf")
    assert origin.file_sha256(path) == hashlib.sha256(b"elf").hexdigest()
