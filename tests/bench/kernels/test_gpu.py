"""Warm-up, and what the device says of itself."""

import contextlib
import functools
import itertools
import weakref

import pytest
import torch

from bench.kernels import gpu


class Settling:
    """Rounds that take less and less, then the same."""

    def __init__(self, times):
        self.times, self.count = iter(times), 0

    def time_round(self, graphs):
        self.count += 1
        return [next(self.times)] * len(graphs)


def test_warm_up_ends_when_rounds_take_the_same():
    device = Settling([30, 25, 20, 18, 15, 12, 11] + [10] * 100)
    assert gpu.warm_up(device, [1, 2], itertools.count(0, 0.05).__next__) == 20
    assert 12 <= device.count <= 20


def test_warm_up_ends_at_its_limit_whatever_the_rounds_take():
    device = Settling(2.0**i for i in range(100))
    gpu.warm_up(device, [1], itertools.count(0, 0.1).__next__)
    assert device.count == round(gpu.WARM_UP_MOST_S / 0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_there_is_one_line():
    with pytest.raises(gpu.Unavailable, match="finds no CUDA device"):
        gpu.Gpu()


def test_nvidia_smi_is_not_needed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu._nvidia_smi("x") == {}


def test_nvidia_smi_is_asked_for_the_card_itself(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$4" = GPU-x ] && echo "580.1, 325.00, Enabled"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    expected = {"driver": "580.1", "power_limit_w": 325.0, "ecc": "Enabled"}
    assert gpu._nvidia_smi("x") == expected
    assert gpu._nvidia_smi("y") == {}
    tool.write_text('#!/bin/sh\necho "580.1, [N/A], [N/A]"\n')
    assert gpu._nvidia_smi("x")["power_limit_w"] is None


class FakeCuda:
    """Events and graphs on one clock in milliseconds; a replay takes 2 ms."""

    def __init__(self, monkeypatch):
        self.now, self.captured = 0.0, []
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.now

            def elapsed_time(self, end):
                return end.at - self.at

        class CUDAGraph:
            def replay(self):
                cuda.now += 2.0

        @contextlib.contextmanager
        def capture(graph):
            cuda.captured.append(graph)
            yield

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_a_round_is_in_microseconds_of_each_graph(monkeypatch):
    FakeCuda(monkeypatch)
    device = object.__new__(gpu.Gpu)
    graphs = [device.capture(lambda: None) for _ in range(3)]
    assert device.time_round(graphs) == [2000.0] * 3


def test_a_graph_keeps_the_buffers_that_it_was_captured_with(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    device = object.__new__(gpu.Gpu)
    buffer = torch.zeros(1)
    alive = weakref.ref(buffer)
    graph = device.capture(functools.partial(buffer.add_, 1))
    assert float(buffer) == 2  # once to set up, once captured
    assert cuda.captured == [graph.graph]
    del buffer
    assert alive() is not None
    del graph
    assert alive() is None
