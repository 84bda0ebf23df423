"""Architectures in fatbin containers; the headers are bytes that nvcc 13.0 wrote."""

import json
import struct
import zipfile

import pytest

from scripts.list_architectures import entries, main, read_library

# The first 48 bytes of an entry, for `__global__ void f(float*)`.
HEADERS = {
    ("ELF", "sm_80"): "0200010140000000280c0000000000000000000000000000"
    "080001005000000000000000000000001100000000000000",
    ("ELF", "sm_90a"): "0200010140000000700e0000000000000000000000000000"
    "080001005a00000000000000000000001100100000000000",
    ("ELF", "sm_100f"): "020001017000000098140000000000000000000040000000"
    "080001006400000000000000000000001100200100000000",
    ("ELF", "sm_120"): "020001017000000098140000000000000000000040000000"
    "080001007800000000000000000000001100000100000000",
    ("ELF", "sm_120a"): "020001017000000098140000000000000000000040000000"
    "080001007800000000000000000000001100100100000000",
    ("PTX", "sm_80"): "01000101500000000001000000000000fb00000040000000"
    "000009005000000000000000000000001180000000000000",
}


def entry(kind: str, architecture: str) -> bytes:
    """A header and a payload of zeros, of the sizes that the header says."""
    header = bytes.fromhex(HEADERS[kind, architecture])
    header_len, payload_len = struct.unpack_from("<IQ", header, 4)
    return header.ljust(header_len, b"\0") + bytes(payload_len)


def container(*names: tuple[str, str]) -> bytes:
    body = b"".join(entry(*name) for name in names)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def elf(sections: dict[bytes, bytes]) -> bytes:
    """A 64-bit ELF file of these sections and their names."""
    names, contents = b"\0", b""
    table = []
    for name, data in {**sections, b".shstrtab": b""}.items():
        table.append([len(names), 64 + len(contents), len(data)])
        names += name + b"\0"
        contents += data
    table[-1][1:] = 64 + len(contents), len(names)
    contents += names
    header = bytearray(b"\x7fELF\x02\x01".ljust(64, b"\0"))
    struct.pack_into("<Q", header, 40, 64 + len(contents))
    struct.pack_into("<HHH", header, 58, 64, len(table), len(table) - 1)
    rows = b"".join(struct.pack("<I20xQQ", *row).ljust(64, b"\0") for row in table)
    return bytes(header) + contents + rows


def test_each_kind_of_architecture_is_told_apart():
    assert list(entries(container(*HEADERS))) == list(HEADERS)


def test_containers_may_be_padded_and_several():
    section = container(("ELF", "sm_80")) + bytes(8) + container(("ELF", "sm_120"))
    assert [name for _, name in entries(section)] == ["sm_80", "sm_120"]


def test_images_and_texts_are_counted_in_both_sections():
    data = elf(
        {
            b".text": b"x" * 7,
            b".nv_fatbin": container(("ELF", "sm_80"), ("PTX", "sm_80")),
            b"__nv_relfatbin": container(("ELF", "sm_80"), ("ELF", "sm_120a")),
        }
    )
    library = read_library("x.so", data)
    assert library.elf == {"sm_80": 2, "sm_120a": 1}
    assert library.ptx == {"sm_80": 1}
    assert library.num_bytes == len(data)


def test_a_library_without_a_container_has_no_architecture():
    library = read_library("x.so", elf({b".text": b"x"}))
    assert not library.elf
    assert not library.ptx


def test_a_container_that_is_cut_short_is_an_error():
    whole = container(("ELF", "sm_80"))
    with pytest.raises(ValueError, match="fatbin container at 0 ends beyond its section"):
        list(entries(whole[:-1]))


def test_an_entry_of_unknown_kind_is_an_error():
    broken = bytearray(container(("ELF", "sm_80")))
    broken[16] = 7
    with pytest.raises(ValueError, match="fatbin entry at 16 has kind 7; 1 and 2 are known"):
        list(entries(bytes(broken)))


def test_a_wheel_becomes_a_table_and_a_json_file(tmp_path, capsys):
    wheel = tmp_path / "x-1-py3.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        names = ("sm_80", "sm_120", "sm_90a")
        kernels = container(*(("ELF", name) for name in names), ("PTX", "sm_80"))
        file.writestr("x/_C.abi3.so", elf({b".nv_fatbin": kernels}))
        file.writestr("x/plain.so", elf({b".text": b"x"}))
        file.writestr("x/__init__.py", "")
    assert main(["--out", str(tmp_path / "table-1.2"), str(wheel)]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table-1.2.md").read_text()
    assert "| library | MB | sm_80 | sm_90a | sm_120 | PTX |" in printed
    assert "| `x/_C.abi3.so` | 0.0 | 1 | 1 | 1 | sm_80 x 1 |" in printed
    assert "| `x/plain.so` | 0.0 | - | - | - | - |" in printed
    body = json.loads((tmp_path / "table-1.2.json").read_text())
    assert [library["name"] for library in body["libraries"]] == ["x/_C.abi3.so", "x/plain.so"]
    assert list(body["sources"]) == [wheel.name]


def test_a_file_that_is_no_library_is_refused(tmp_path, capsys):
    path = tmp_path / "x.so"
    path.write_text("text")
    assert main(["--out", str(tmp_path / "table"), str(path)]) == 2
    assert "not a 64-bit little-endian ELF file" in capsys.readouterr().err
