"""The calls that Marlin is timed through compute the layer, with arguments that vLLM declares."""

import pytest
import torch

from bench.kernels import marlin
from bench.kernels.check import Checker
from bench.kernels.problem import Shape
from tests.bench.kernels.fakes import CPU, LIMIT, FakeC, FakeMoeC, random_batch

# Two groups along k, as Marlin needs them to read scales the way our layout has them.
SHAPE = Shape(hidden_size=256, inter_size=256, num_experts=5, top_k=2)


def verdict(arm: marlin.Marlin, tokens: int, interleaved: bool):
    batch = random_batch(tokens=tokens, shape=SHAPE)
    batch.outs.fill_(float("nan"))
    step = arm.prepare(batch)
    for i in range(batch.num_steps):
        step(i)
    return Checker(batch, 1, LIMIT).judge(arm.name, interleaved, batch.outs[1])


@pytest.mark.parametrize("tokens", [1, 3, 30])
@pytest.mark.parametrize("silu", ["vllm", "torch"])
def test_marlin_computes_the_layer_whose_first_rows_are_gate(tokens, silu):
    activation = {
        "vllm": marlin.vllm_activation(LIMIT, FakeC()),
        "torch": marlin.torch_activation(LIMIT, SHAPE.inter_size, CPU),
    }[silu]
    ops = FakeMoeC()
    arm = marlin.Marlin("marlin", activation, False, 4, ops)
    assert verdict(arm, tokens, interleaved=False).accepted
    assert ops.calls == 2 * ["align", "gemm", "gemm", "sum"]
    assert set(ops.locks) == {16}
    assert not verdict(arm, tokens, interleaved=True).accepted


def test_the_clamp_of_the_pytorch_activation_is_vllms():
    gate_up = torch.tensor([[-20.0, 20.0, 1.0, 5.0, -20.0, 20.0]], dtype=torch.bfloat16)
    expected, out = torch.empty(1, 3).bfloat16(), torch.empty(1, 3).bfloat16()
    marlin.vllm_activation(LIMIT, FakeC())(gate_up, expected)
    marlin.torch_activation(LIMIT, 3, CPU)(gate_up.clone(), out)
    torch.testing.assert_close(out, expected)


def test_without_its_down_gemm_marlin_is_wrong():
    activation = marlin.vllm_activation(LIMIT, FakeC())
    arm = marlin.Marlin("broken", activation, False, 4, FakeMoeC(), skip_down=True)
    assert not verdict(arm, 3, interleaved=False).accepted


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, 8), (128, 8), (306, 8), (308, 16), (2048, 64), (65536, 64)]
)
def test_block_sizes_are_those_that_vllm_chooses(tokens, size):
    assert marlin.block_size(tokens, 6, 256) == size


def test_a_library_is_the_one_named_or_the_installed_one(tmp_path, monkeypatch):
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "vllm", raising=False)
    assert marlin.find_library("a.so", None) is None
    (package / "a.so").touch()
    assert marlin.find_library("a.so", None) == package / "a.so"
    given = tmp_path / "b.so"
    with pytest.raises(ValueError, match=r"b\.so: no such file"):
        marlin.find_library("a.so", given)
    given.touch()
    assert marlin.find_library("a.so", given) == given
