"""Block-FP8 linear layers on CPUs without AMX: weights dequantized once, float32 arithmetic.

vLLM's own kernel for these needs AMX. A weight takes 4 bytes per parameter here, so this is for
checking and for small models.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledMMLinearKernel,
    FP8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from kernels.formats import FP8_BLOCK, dequantize_fp8_block


class ReferenceFp8BlockLinear(Fp8BlockScaledMMLinearKernel):
    """y = x W^T with W = FP8 e4m3 codes times 128 x 128 block scales; x is not quantized."""

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return (True, None) if current_platform.is_cpu() else (False, "requires a CPU")

    @classmethod
    def can_implement(cls, config: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        shape = config.weight_quant_key.scale.group_shape
        if (shape.row, shape.col) != (FP8_BLOCK, FP8_BLOCK):
            return False, f"weight blocks are {shape.row} x {shape.col}; needs {FP8_BLOCK} squared"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the layer's FP8 codes (out, in) by their float32 values."""
        params = self._get_layer_params(layer)
        scale = params.weight_scale_inv
        if scale is None:
            scale = params.weight_scale
        if scale.dtype == torch.uint8:
            # The loader keeps E8M0 exponents as raw bytes; uint8 numbers never occur here.
            scale = scale.view(torch.float8_e8m0fnu)
        weight = dequantize_fp8_block(params.weight.data, scale.data)
        replace_parameter(layer, params.WEIGHT, torch.nn.Parameter(weight, requires_grad=False))

    def apply_weights(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        weight = self._get_layer_params(layer).weight
        return functional.linear(x.float(), weight, bias).to(x.dtype)

    def apply_block_scaled_mm(
        self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor
    ) -> torch.Tensor:
        raise NotImplementedError("ReferenceFp8BlockLinear overrides apply_weights")


def register_reference_linear(prefer: bool) -> None:
    """Offer the kernel to vLLM's selection on CPUs: last, or first where `prefer`. Idempotent."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if ReferenceFp8BlockLinear not in kernels:
        kernels.insert(0 if prefer else len(kernels), ReferenceFp8BlockLinear)
