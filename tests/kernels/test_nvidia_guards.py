"""FP8 kernels that would compute wrong numbers are refused by name."""

import pytest
import torch
from torch import nn

from kernels.nvidia.guards import check_fp8_kernels

DeepGemm = type("DeepGemmFp8BlockScaledMMKernel", (), {})
FlashInfer = type("FlashInferFp8DeepGEMMDynamicBlockScaledKernel", (), {})
Cutlass = type("CutlassFp8BlockScaledMMKernel", (), {})


def model(kernel: type, is_bmm: bool, dtype: torch.dtype = torch.float8_e4m3fn) -> nn.Module:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)
    layer.is_bmm = is_bmm
    layer.scheme = type("Scheme", (), {"fp8_linear": kernel()})()
    root = nn.Module()
    root.wo_a = layer
    return root


@pytest.mark.parametrize(
    ("kernel", "is_bmm", "major", "power_of_two"),
    [
        (DeepGemm, True, 12, True),
        (DeepGemm, True, 9, False),
        (FlashInfer, True, 9, True),
        (Cutlass, False, 12, False),
    ],
)
def test_what_computes_the_right_numbers_passes(kernel, is_bmm, major, power_of_two):
    check_fp8_kernels(model(kernel, is_bmm), major, power_of_two)


def test_a_batched_fp8_layer_needs_deep_gemm():
    with pytest.raises(ValueError, match="wo_a: FP8 with CutlassFp8.*DeepGEMM is needed"):
        check_fp8_kernels(model(Cutlass, is_bmm=True), 12, True)


def test_a_batched_bf16_layer_does_not():
    check_fp8_kernels(model(Cutlass, is_bmm=True, dtype=torch.bfloat16), 12, True)


@pytest.mark.parametrize("is_bmm", [True, False])
def test_deep_gemm_with_fp32_scales_is_refused_on_capability_12(is_bmm):
    with pytest.raises(ValueError, match="wo_a: DeepGemm.*with FP32 scales on compute capability"):
        check_fp8_kernels(model(DeepGemm, is_bmm), 12, False)
