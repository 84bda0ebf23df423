"""Guard of moe-let-a-plugin-offer-experts-for-fp4-and-int4-weights.patch."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine


class Offered:
    """An experts class of a plugin; takes DeepSeek-V4 layers only."""

    @staticmethod
    def is_supported_config(cls, config, weight_key, activation_key, activation_format):
        return config.wanted, None if config.wanted else "not wanted"


def layer_config(wanted: bool) -> SimpleNamespace:
    parallel = SimpleNamespace(use_batched_activation_format=False)
    return SimpleNamespace(
        moe_backend="auto", moe_parallel_config=parallel, routing_method=None, wanted=wanted
    )


@pytest.fixture
def offered(monkeypatch):
    from vllm.model_executor.layers.fused_moe.oracle import base

    # A list that nobody consults is what a plugin would be left with.
    lists = {"mxfp4": [Offered], "wna16": [Offered]}
    if hasattr(base, "EXTERNAL_EXPERTS"):
        for weight_format, classes in lists.items():
            monkeypatch.setitem(base.EXTERNAL_EXPERTS, weight_format, classes)


@pytest.mark.usefixtures("offered")
def test_an_fp4_experts_class_of_a_plugin_is_chosen_first_and_gets_the_weights_as_loaded():
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4

    backend, chosen = mxfp4.select_deepseek_v4_mxfp4_moe_backend(layer_config(wanted=True))
    assert chosen is Offered
    weights = [torch.nn.Parameter(torch.rand(2, 3, 4)) for _ in range(4)]
    converted = mxfp4.convert_weight_to_mxfp4_moe_kernel_format(
        backend, torch.nn.Module(), *weights
    )
    assert all(torch.equal(a, b) for a, b in zip(converted[:4], weights, strict=True))
    config = mxfp4.make_mxfp4_moe_quant_config(backend, weights[2], weights[3], swiglu_limit=10.0)
    assert config.gemm1_clamp_limit == 10.0
    assert config.quant_dtype is None  # activations stay as they are


@pytest.mark.usefixtures("offered")
def test_an_int4_experts_class_of_a_plugin_is_chosen_first_and_gets_the_weights_as_loaded():
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16
    from vllm.model_executor.layers.quantization.utils.quant_utils import kInt4Static

    scheme = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=128)
    backend, chosen = int_wna16.select_wna16_moe_backend(
        layer_config(wanted=True), kInt4Static, scheme, may_have_zp=False, may_have_bias=False
    )
    assert chosen is Offered
    weights = [torch.rand(2, 3, 4) for _ in range(4)]
    converted = int_wna16.convert_to_wna16_moe_kernel_format(
        backend, torch.nn.Module(), scheme, torch.bfloat16, *weights
    )
    assert all(a is b for a, b in zip(converted[:4], weights, strict=True))


@pytest.mark.usefixtures("offered")
def test_a_class_that_declines_a_layer_is_passed_over():
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4

    declined = mxfp4.Mxfp4MoeBackend.EXTERNAL
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mxfp4, "_get_priority_backends", list)
        with pytest.raises(NotImplementedError):
            mxfp4.select_deepseek_v4_mxfp4_moe_backend(layer_config(wanted=False))
    assert mxfp4.backend_to_kernel_cls(declined) == [Offered]


def test_a_class_can_see_how_wide_a_scale_group_is():
    """The layer's config says it: a QuantKey is the same for groups of 64 and of 128."""
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as wna16,
    )

    scheme = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=64)
    seen = []
    with pytest.MonkeyPatch.context() as patch:

        def select(config, **_):
            seen.append(config.weight_group_size)
            return wna16.WNA16MoEBackend.EMULATION, Offered

        patch.setattr(wna16, "select_wna16_moe_backend", select)
        wna16.CompressedTensorsWNA16MoEMethod(scheme, None, SimpleNamespace())
    assert seen == [64]
