"""What a run needs is found, or named."""

import pytest
import torch

from bench.kernels import setup
from bench.kernels.config import BenchConfig
from bench.kernels.gpu import Unavailable
from bench.kernels.marlin import C_LIBRARY, MOE_LIBRARY
from tests.bench.kernels.fakes import FakeGpu


@pytest.fixture
def loaded(monkeypatch):
    """Libraries that were loaded; ours is built, vLLM is not installed."""
    names = []
    monkeypatch.setattr(setup.build, "library_path", lambda: None)
    monkeypatch.setattr(torch.ops, "load_library", names.append)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    return names


def library(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"elf")
    return path


def test_without_our_library_nothing_starts(monkeypatch):
    def missing():
        raise RuntimeError("kernels: not built; run `make kernels`")

    monkeypatch.setattr(setup.build, "library_path", missing)
    with pytest.raises(Unavailable, match="run `make kernels`"):
        setup.make_arms(BenchConfig(), FakeGpu())


def test_without_marlin_there_is_nothing_to_compare_with(loaded):
    with pytest.raises(Unavailable, match="no Marlin to compare with.*--marlin"):
        setup.make_arms(BenchConfig(), FakeGpu())


def test_vllms_own_activation_is_taken_where_it_is(loaded, tmp_path):
    moe, c = library(tmp_path, MOE_LIBRARY), library(tmp_path, C_LIBRARY)
    arms = setup.make_arms(BenchConfig(marlin=moe, vllm_c=c), FakeGpu())
    assert loaded == [str(moe), str(c)]
    assert arms.libraries == {MOE_LIBRARY: moe, C_LIBRARY: c}
    assert "vLLM's silu_and_mul_with_clamp" in arms.notes["marlin"]
    assert [(arm.name, arm.interleaved) for arm in arms.baselines] == [
        ("marlin", False), ("marlin_interleaved", True),
    ]  # fmt: skip


def test_for_want_of_it_pytorchs_is_and_the_result_says_so(loaded, tmp_path):
    moe = library(tmp_path, MOE_LIBRARY)
    arms = setup.make_arms(BenchConfig(marlin=moe), FakeGpu())
    assert loaded == [str(moe)]
    assert f"for want of {C_LIBRARY}" in arms.notes["marlin"]


def test_a_library_that_does_not_load_is_named(loaded, tmp_path, monkeypatch):
    def fails(path):
        raise OSError("undefined symbol: x")

    monkeypatch.setattr(torch.ops, "load_library", fails)
    with pytest.raises(Unavailable, match=f"{MOE_LIBRARY} does not load: undefined symbol"):
        setup.make_arms(BenchConfig(marlin=library(tmp_path, MOE_LIBRARY)), FakeGpu())
