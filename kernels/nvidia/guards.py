"""Combinations of kernels that would compute wrong numbers, refused before a weight is read."""

from __future__ import annotations

import torch
from torch import nn

ENV_HINT = "leave VLLM_USE_DEEP_GEMM and VLLM_USE_DEEP_GEMM_E8M0 at 1, and --linear-backend unset"


def fp8_kernel(module: nn.Module) -> str | None:
    """Class name of the FP8 kernel of a linear layer, or None if its weight is not FP8."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dtype != torch.float8_e4m3fn:
        return None
    holder = getattr(module, "scheme", None) or getattr(module, "quant_method", None)
    return type(getattr(holder, "fp8_linear", None)).__name__


def check_fp8_kernels(model: nn.Module, capability_major: int, power_of_two_scales: bool) -> None:
    """Refuse FP8 layers that the chosen kernels cannot compute.

    Args:
        model: constructed, not loaded.
        capability_major: of the GPU.
        power_of_two_scales: what vLLM's `is_deep_gemm_e8m0_used` says.
    Raises:
        ValueError: a batched FP8 layer (wo_a) without DeepGEMM, whose preparation of weight and
            scale the attention relies on; or DeepGEMM on compute capability 12 with FP32 scales,
            of which its kernels there read the exponent only (vLLM #57512).
    """
    for name, module in model.named_modules():
        kernel = fp8_kernel(module)
        if kernel is None:
            continue
        # FlashInferFp8DeepGEMMDynamic... on Hopper prepares its weights as DeepGEMM does.
        is_deep_gemm = "deepgemm" in kernel.lower()
        if getattr(module, "is_bmm", False) and not is_deep_gemm:
            raise ValueError(f"{name}: FP8 with {kernel}; DeepGEMM is needed there: {ENV_HINT}")
        if is_deep_gemm and capability_major == 12 and not power_of_two_scales:
            raise ValueError(
                f"{name}: {kernel} with FP32 scales on compute capability 12, which reads them as "
                f"powers of two: {ENV_HINT}"
            )
