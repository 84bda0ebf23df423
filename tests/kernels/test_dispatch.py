"""Dispatch tables, read: which table, which kernel, and what is no table."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.kernels import dispatch as writer
from bench.kernels.problem import Shape as BenchShape
from kernels import dispatch
from kernels.dispatch import (
    Device,
    Dispatch,
    Kernel,
    Shape,
    find_dispatch,
    find_similar,
    read_tables,
)

SHAPE = Shape(4096, 1024, 256, 6)
MAXQ = Device("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "12.0")
SEGMENTS = [
    {"max_tokens": 4, "kernel": "ours"},
    {"max_tokens": 63, "kernel": "marlin"},
    {"max_tokens": 64, "kernel": "ours"},
    {"max_tokens": None, "kernel": "marlin"},
]


def table(segments: list[dict] | None = None, **changes: Any) -> dict[str, Any]:
    return {**SHAPE.__dict__, "segments": segments or SEGMENTS, **changes}


def write(folder, name="a", device=MAXQ, tables=None, **changes: Any):
    path = folder / f"{name}.json"
    body = {
        "schema_version": 1,
        "device": device.name,
        "capability": device.capability,
        "tables": [table()] if tables is None else tables,
    }
    path.write_text(json.dumps(body | changes))
    return path


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv(dispatch.ENV, raising=False)


@pytest.mark.parametrize(
    ("tokens", "kernel"),
    [
        (1, Kernel.OURS),
        (4, Kernel.OURS),
        (5, Kernel.MARLIN),
        (63, Kernel.MARLIN),
        (64, Kernel.OURS),
        (65, Kernel.MARLIN),
        (1 << 20, Kernel.MARLIN),
    ],
)
def test_a_batch_takes_the_first_segment_that_reaches_so_far(tmp_path, tokens, kernel):
    [(shape, found)] = read_tables(write(tmp_path))
    assert shape == SHAPE
    assert found.kernel(tokens) is kernel
    assert found.kernels == {Kernel.OURS, Kernel.MARLIN}


def test_a_table_in_words():
    found = Dispatch(((4, Kernel.OURS), (None, Kernel.MARLIN)), MAXQ, "a.json")
    assert str(found) == "ours for 1 to 4 tokens, marlin for 5 and more tokens"
    assert str(dispatch.only_ours("why")) == "ours for 1 and more tokens"


def test_what_the_benchmark_writes_is_read_the_same(tmp_path):
    path = tmp_path / "gpu.json"
    ratios = {1: 1.7, 2: 1.4, 4: 0.9, 8: 0.95, 16: 1.1, 32: 1.2, 64: 0.99}
    for inter in (1024, 2048):
        shape = BenchShape(4096, inter, 256, 6)
        writer.write_table(path, MAXQ.name, MAXQ.capability, shape, ratios, {"commit": "abc"})
    found = find_dispatch(SHAPE, MAXQ, [path])
    assert (found.measured_on, found.source) == (MAXQ, "gpu.json")
    rows = writer.segments(ratios)
    for tokens in range(1, 130):
        assert found.kernel(tokens).value == writer.lookup(rows, tokens)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([("b", MAXQ), ("a", Device("RTX PRO 6000", "12.0"))], "b.json"),
        ([("b", Device("RTX PRO 6000", "12.0")), ("a", Device("H100", "9.0"))], "b.json"),
        ([("b", Device("H200", "9.0")), ("a", Device("H100", "9.0"))], "a.json"),
    ],
    ids=["this device", "its capability", "any, by name"],
)
def test_the_table_measured_nearest_to_the_device_is_taken(tmp_path, monkeypatch, others, expected):
    monkeypatch.setattr(dispatch, "FOLDER", tmp_path)
    for name, device in others:
        write(tmp_path, name, device)
    assert find_dispatch(SHAPE, MAXQ).source == expected


def test_a_shape_that_nobody_measured_has_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "FOLDER", tmp_path)
    assert find_dispatch(SHAPE, MAXQ) is None
    write(tmp_path)
    assert find_dispatch(Shape(4096, 2048, 256, 6), MAXQ) is None


def test_the_variable_names_the_only_file_that_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "FOLDER", tmp_path)
    write(tmp_path, "shipped")
    own = tmp_path / "own"
    own.mkdir()
    path = write(own, "mine", Device("H100", "9.0"))
    monkeypatch.setenv(dispatch.ENV, str(path))
    assert find_dispatch(SHAPE, MAXQ).source == "mine.json"
    with pytest.raises(ValueError, match=r"DSV4_DISPATCH_TABLE = .*mine.json'; it has no table of"):
        find_dispatch(Shape(4096, 2048, 256, 6), MAXQ)
    monkeypatch.setenv(dispatch.ENV, str(own / "absent.json"))
    with pytest.raises(ValueError, match=r"absent.json'; there is no such file"):
        find_dispatch(SHAPE, MAXQ)


ENDS = "they must ascend from 1, and only the last may be null"
BROKEN = {
    "no end": ({"tables": [table(SEGMENTS[:3])]}, ENDS),
    "an end inside": ({"tables": [table([SEGMENTS[3], SEGMENTS[3]])]}, ENDS),
    "not ascending": ({"tables": [table([SEGMENTS[1], SEGMENTS[0], SEGMENTS[3]])]}, ENDS),
    "twice the same": ({"tables": [table([SEGMENTS[0], SEGMENTS[0], SEGMENTS[3]])]}, ENDS),
    "zero": ({"tables": [table([{"max_tokens": 0, "kernel": "ours"}, SEGMENTS[3]])]}, ENDS),
    "half": ({"tables": [table([{"max_tokens": 1.5, "kernel": "ours"}, SEGMENTS[3]])]}, ENDS),
    "another kernel": (
        {"tables": [table([{"max_tokens": None, "kernel": "triton"}])]},
        "'triton' is not a valid Kernel",
    ),
    "no top_k": ({"tables": [{k: v for k, v in table().items() if k != "top_k"}]}, "top_k is miss"),
    "another schema": ({"schema_version": 2}, "schema_version = 2; 1 is needed"),
    "no tables": ({"tables": 7}, "not iterable"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, name):
    changes, message = BROKEN[name]
    path = write(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"dispatch table: .*a.json: .*{message}"):
        find_dispatch(SHAPE, MAXQ, [path])


def test_no_segment_is_no_table():
    with pytest.raises(ValueError, match=r"max_tokens = \[\]; they must ascend"):
        Dispatch((), MAXQ, "a.json")


def test_a_file_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="dispatch table: .*a.json: Expecting"):
        read_tables(path)


def test_what_ships_can_be_read_and_serves_a_decode_step_of_flash_on_two_ranks():
    for path in dispatch.FOLDER.glob("*.json"):
        assert read_tables(path)
    shipped = find_dispatch(SHAPE, MAXQ)
    assert [shipped.kernel(tokens) for tokens in (1, 2, 3, 4)] == [Kernel.OURS] * 4


def test_a_layer_without_a_table_takes_that_of_the_layer_most_like_it(tmp_path):
    wide = [{"max_tokens": 8, "kernel": "ours"}, {"max_tokens": None, "kernel": "marlin"}]
    tables = [
        table(),
        table(wide, inter_size=4096),
        table([{"max_tokens": None, "kernel": "marlin"}], top_k=8, inter_size=2048),
    ]
    paths = [write(tmp_path, tables=tables)]
    assert find_dispatch(Shape(4096, 3072, 256, 6), MAXQ, paths) is None
    found = find_similar(Shape(4096, 3072, 256, 6), MAXQ, paths)
    assert str(found) == "ours for 1 to 8 tokens, marlin for 9 and more tokens"
    assert found.source == f"a.json, there for {Shape(4096, 4096, 256, 6)}"
    assert find_similar(Shape(4096, 1408, 256, 6), MAXQ, paths).kernel(5) is Kernel.MARLIN
    assert find_similar(Shape(4096, 1024, 64, 6), MAXQ, paths) is None
