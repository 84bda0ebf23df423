"""The CPU experts against float64, and the reason why vLLM's own are not used."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

pytest.importorskip("vllm")

from kernels.formats import quantize_fp4, quantize_int4

pytestmark = pytest.mark.engine

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOPK, LIMIT = 4, 256, 128, 9, 2, 10.0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def routing():
    ids = torch.stack([torch.randperm(EXPERTS)[:TOPK] for _ in range(TOKENS)]).int()
    return torch.rand(TOKENS, TOPK), ids


def exact(x, w13, w2, weights, ids, limit):
    """Token by token in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for weight, expert in zip(weights[t].double(), ids[t].tolist(), strict=True):
            gate, up = (w13[expert].double() @ x[t].double()).chunk(2)
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            out[t] += weight * (w2[expert].double() @ (functional.silu(gate) * up))
    return out


def relative(out, ref):
    return ((out.double() - ref).norm() / ref.norm()).item()


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_the_sum_over_experts_is_right_to_bfloat16(limit):
    from kernels.cpu.experts import moe_forward

    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE)
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    weights, ids = routing()
    out = moe_forward(x, w13, w2, weights, ids, limit)
    assert relative(out, exact(x, w13, w2, weights, ids, limit)) < 2**-8
    # The clamp is not idle on these values.
    other = exact(x, w13, w2, weights, ids, LIMIT if limit is None else None)
    assert relative(out, other) > 0.1


def layer_of(quantize, names):
    """A layer as the loader leaves it, and its dequantized weights."""
    from kernels.formats import dequantize_fp4, dequantize_int4

    layer, values = torch.nn.Module(), {}
    for name, shape in (("w13", (2 * INTERMEDIATE, HIDDEN)), ("w2", (HIDDEN, INTERMEDIATE))):
        parts = [quantize(torch.randn(shape)) for _ in range(EXPERTS)]
        packed = torch.stack([p[0] for p in parts])
        if quantize is quantize_fp4:
            scale = torch.stack([p[1].view(torch.uint8) for p in parts])
            values[name] = torch.stack([dequantize_fp4(p[0], p[1]) for p in parts])
            packed = packed.view(torch.uint8)
        else:
            scale = torch.stack([p[1] for p in parts])
            values[name] = torch.stack([dequantize_int4(p[0], p[1]) for p in parts])
        setattr(layer, names.format(name), torch.nn.Parameter(packed, requires_grad=False))
        setattr(layer, f"{name}_weight_scale", torch.nn.Parameter(scale, requires_grad=False))
    return layer, values


@pytest.mark.parametrize(
    ("cls_name", "quantize", "names"),
    [
        ("ReferenceExpertsMxfp4", quantize_fp4, "{}_weight"),
        ("ReferenceExpertsInt4", quantize_int4, "{}_weight_packed"),
    ],
)
def test_experts_apply_the_clamp_to_weights_as_loaded(cls_name, quantize, names):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from kernels.cpu import experts

    layer, values = layer_of(quantize, names)
    cls = getattr(experts, cls_name)
    instance = object.__new__(cls)
    instance.quant_config = SimpleNamespace(gemm1_clamp_limit=LIMIT)
    instance.process_weights_after_loading(layer)
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    weights, ids = routing()
    out = torch.full((TOKENS, HIDDEN), float("nan")).bfloat16()
    empty = torch.empty(0)
    arguments = (out, x, empty, empty, weights, ids, MoEActivation.SILU, EXPERTS, None)
    instance.apply(*arguments, None, None, empty, empty, None, False)
    assert relative(out, exact(x, values["w13"], values["w2"], weights, ids, LIMIT)) < 2**-7
    with pytest.raises(NotImplementedError, match="apply_router_weight_on_input = True"):
        instance.apply(*arguments, None, None, empty, empty, None, True)


def test_only_deepseek_v4_layers_are_taken():
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType

    from kernels.cpu.experts import ReferenceExpertsInt4

    takes = ReferenceExpertsInt4._supports_routing_method
    assert takes(RoutingMethodType.DeepseekV4, None, None)
    assert not takes(RoutingMethodType.Renormalize, None, None)


def test_vllms_compiled_fp4_experts_still_lose_the_clamp():
    """When this fails, vLLM has mended it, and ReferenceExpertsMxfp4 may give way on AMX."""
    from vllm._custom_ops import CPUQuantMethod, fused_experts_cpu
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import prepare_mxfp4_moe_layer_for_cpu
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not torch.cpu._is_amx_tile_supported() or not hasattr(torch.ops._C, "fused_experts_cpu"):
        pytest.skip("the compiled experts need AMX")
    layer, values = layer_of(quantize_fp4, "{}_weight")
    packed = prepare_mxfp4_moe_layer_for_cpu(
        layer.w13_weight, layer.w2_weight, layer.w13_weight_scale, layer.w2_weight_scale
    )
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    weights, ids = routing()
    out = torch.empty(TOKENS, HIDDEN).bfloat16()
    quantized = (CPUQuantMethod.MXFP4, packed[2], packed[3], None, None, None, None, None)
    fused_experts_cpu(out, x, packed[0], packed[1], weights, ids, *quantized, None, LIMIT, True)
    w13, w2 = values["w13"], values["w2"]
    assert relative(out, exact(x, w13, w2, weights, ids, None)) < 2**-6
    assert relative(out, exact(x, w13, w2, weights, ids, LIMIT)) > 0.1
