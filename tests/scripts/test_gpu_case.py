"""What a case makes of its measurements; the measurements themselves need a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.gpu_case import read_trace


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
