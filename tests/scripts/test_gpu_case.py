"""What a case makes of its measurements; the measurements themselves need a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.gpu_case import CASES, OURS, read_trace, start_engine


def scope(name: str, start: float, end: float) -> dict[str, Any]:
    return {"cat": "user_annotation", "name": name, "ts": start, "dur": end - start}


def launch(correlation: int, at: float, category: str = "cuda_runtime") -> dict[str, Any]:
    return {"cat": category, "name": "launch", "ts": at, "args": {"correlation": correlation}}


def kernel(name: str, correlation: int, us: float) -> dict[str, Any]:
    """It runs long after its launch."""
    arguments = {"correlation": correlation}
    return {"cat": "kernel", "name": name, "ts": 1000.0, "dur": us, "args": arguments}


EVENTS = [
    {"ph": "M", "name": "process_name"},
    scope("csa/layer", 0, 100),
    scope("csa/attn", 10, 40),
    scope("csa/ffn", 50, 90),
    scope("csa/layer", 200, 300),
    scope("prefill", 400, 500),
    launch(1, 20, "cuda_driver"),
    launch(2, 60),
    launch(3, 95),
    launch(4, 250),
    launch(5, 450),
    kernel("attend", 1, 5.0),
    kernel("expert", 2, 7.0),
    kernel("mix", 3, 2.0),
    kernel("mix", 4, 4.0),
    kernel("expert", 5, 100.0),
    kernel("lost", 6, 3.0),
]


def test_a_kernel_counts_where_it_was_launched():
    found = read_trace(EVENTS)
    assert found["kinds"] == {
        "csa/layer": {"calls": 2, "us_per_call": 9.0},
        "csa/attn": {"calls": 1, "us_per_call": 5.0},
        "csa/ffn": {"calls": 1, "us_per_call": 7.0},
    }
    assert found["us_total"] == 121.0
    assert found["us_of_unknown_launch"] == 3.0


def test_the_slowest_kernels_come_first():
    kernels = read_trace(EVENTS)["kernels"]
    assert kernels[0] == {"name": "expert", "calls": 2, "us": 107.0}
    assert [entry["name"] for entry in kernels] == ["expert", "mix", "attend", "lost"]


def test_a_trace_without_kernels_is_an_error():
    with pytest.raises(RuntimeError, match="recorded no kernel"):
        read_trace([scope("csa/layer", 0, 1)])


def test_kernels_of_graphs_are_summed_by_name():
    events = [
        *EVENTS,
        {**launch(7, 600), "name": "cudaGraphLaunch"},
        kernel("expert", 7, 11.0),
        kernel("mix", 7, 1.5),
        kernel("expert", 7, 12.0),
    ]
    assert read_trace(events)["us_in_graphs"] == {"expert": 23.0, "mix": 1.5}
    assert read_trace(EVENTS)["us_in_graphs"] == {}


def test_a_graph_spans_from_its_first_kernel_to_its_last():
    events = [
        *EVENTS,
        {**launch(7, 600), "name": "cudaGraphLaunch"},
        {**launch(8, 700), "name": "cudaGraphLaunch"},
        {**kernel("up", 7, 10.0), "ts": 2000.0},
        {**kernel("down", 7, 12.0), "ts": 2003.0},  # it starts before `up` has ended
        {**kernel("up", 8, 9.0), "ts": 3000.0},
    ]
    assert read_trace(events)["us_spanned_by_graphs"] == 15.0 + 9.0
    assert read_trace(EVENTS)["us_spanned_by_graphs"] == 0


def test_each_case_asks_for_its_experts(monkeypatch):
    asked = {}

    def engine(model: str, **arguments: Any) -> None:
        asked[model] = arguments["moe_backend"]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=engine))
    for name, case in CASES.items():
        start_engine(case, Path(name))
    assert asked["ours-k0"] == asked["ours-k1"] == OURS == "external"
    assert asked["tiny-k0"] == asked["tiny-k1"] == "auto"
    assert {asked[name] for name in asked if name.startswith(("graphs", "eager"))} == {"marlin"}


def test_the_cases_with_our_experts_differ_from_those_before_in_nothing_else():
    for k in (0, 1):
        before, after = vars(CASES[f"graphs-k{k}"]), vars(CASES[f"ours-k{k}"])
        assert {name for name in before if before[name] != after[name]} == {"moe_backend"}
