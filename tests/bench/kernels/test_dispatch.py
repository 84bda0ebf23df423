"""The table that says which kernel serves a batch."""

import json

import pytest

from bench.kernels import dispatch
from tests.bench.kernels.fakes import SHAPE


def served(ratios: dict[int, float], *sizes: int) -> list[str]:
    rows = dispatch.segments(ratios)
    return [dispatch.lookup(rows, size) for size in sizes]


def test_ours_serves_where_it_is_not_slower():
    ratios = {1: 1.8, 4: 1.0, 8: 0.999, 64: 0.9}
    assert served(ratios, 1, 4, 8, 64) == ["ours", "ours", "marlin", "marlin"]
    assert dispatch.segments(ratios) == [
        {"max_tokens": 4, "kernel": "ours"},
        {"max_tokens": None, "kernel": "marlin"},
    ]


def test_between_sizes_that_disagree_marlin_serves():
    ratios = {2: 1.5, 8: 0.9, 32: 1.2, 64: 0.8}
    assert served(ratios, 2, 3, 8, 9, 31, 32, 33) == [
        "ours", "marlin", "marlin", "marlin", "marlin", "ours", "marlin",
    ]  # fmt: skip


def test_between_sizes_that_agree_the_same_kernel_serves():
    assert served({2: 1.5, 8: 1.1}, 1, 5, 8) == ["ours", "ours", "ours"]


def test_beyond_what_was_measured_marlin_serves():
    assert served({1: 2.0, 64: 1.5}, 64, 65, 100_000) == ["ours", "marlin", "marlin"]


def test_a_table_of_one_kernel_has_one_segment():
    assert dispatch.segments({1: 0.5}) == [{"max_tokens": None, "kernel": "marlin"}]


def write(path, device="Fake GPU", inter=128, ratios=None):
    shape = type(SHAPE)(128, inter, 8, 2)
    dispatch.write_table(path, device, "9.0", shape, ratios or {1: 1.5}, {"commit": "abc"})


def test_tables_of_other_shapes_stay_and_that_of_the_same_is_replaced(tmp_path):
    path = tmp_path / "new" / "table.json"
    write(path)
    write(path, inter=256, ratios={1: 0.5})
    write(path, ratios={1: 1.25})
    data = json.loads(path.read_text())
    assert (data["device"], data["capability"]) == ("Fake GPU", "9.0")
    assert [(t["inter_size"], t["measured"]) for t in data["tables"]] == [
        (128, [{"tokens": 1, "ratio": 1.25}]),
        (256, [{"tokens": 1, "ratio": 0.5}]),
    ]
    assert data["tables"][0]["provenance"] == {"commit": "abc"}


def test_a_table_of_another_device_is_refused(tmp_path):
    path = tmp_path / "table.json"
    write(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="this device is .*Other GPU"):
        write(path, device="Other GPU")
    assert path.read_bytes() == before
