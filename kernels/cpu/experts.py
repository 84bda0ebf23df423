"""DeepSeek-V4's routed experts on a CPU: FP4 of the original checkpoint and INT4 W4A16.

vLLM 0.32.0's CPU experts do not serve this model: the FP4 kernel applies `swiglu_limit` only
together with an `alpha` that DeepSeek-V4 does not have, so the clamp is lost; the INT4 kernel
quantizes activations to INT8 and knows no clamp and no DeepSeek-V4 routing. Both need AMX.

Weights are dequantized once and take 4 bytes per parameter: for checking and for small models.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    QuantKey,
    kInt4Static,
    kMxfp4Static,
)
from vllm.platforms import current_platform

from kernels.experts_base import WholeLayerExperts
from kernels.formats import dequantize_fp4, dequantize_int4


def moe_forward(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    limit: float | None,
) -> torch.Tensor:
    """Sum over a token's experts of weight * w2(silu(gate) * up).

    Args:
        x: (tokens, hidden).
        w13: float32 (experts, 2 * intermediate, hidden), gate rows before up rows.
        w2: float32 (experts, hidden, intermediate).
        topk_weights: float32 (tokens, topk).
        topk_ids: int (tokens, topk).
        limit: clamp of gate (from above) and up (both sides), or None.
    Returns:
        float32 (tokens, hidden). The product silu(gate) * up is rounded to x's dtype before w2.
    Source: DeepSeek-V4 `Expert.forward`.
    """
    out = torch.zeros(x.shape, dtype=torch.float32)
    rows = x.float()
    for expert in torch.unique(topk_ids).tolist():
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(rows[token], w13[expert]).chunk(2, dim=-1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        hidden = (functional.silu(gate) * up).to(x.dtype).float()
        result = functional.linear(hidden, w2[expert])
        out.index_add_(0, token, result * topk_weights[token, slot].float().unsqueeze(1))
    return out


class _ReferenceExperts(WholeLayerExperts):
    """What the two formats share; a subclass names its format and dequantizes it."""

    weight_key: QuantKey

    @staticmethod
    @abstractmethod
    def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """One expert's weight (out, packed in) and scale as float32 (out, in)."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        def values(name: str) -> torch.Tensor:
            weight = getattr(layer, self.weight_name(name))
            scale = getattr(layer, f"{name}_weight_scale")
            return torch.stack([self.dequantize(w, s) for w, s in zip(weight, scale, strict=True)])

        self._w13, self._w2 = values("w13"), values("w2")

    @staticmethod
    def weight_name(name: str) -> str:
        return f"{name}_weight"

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cpu()

    @staticmethod
    def _supports_routing_method(
        routing_method: RoutingMethodType,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
    ) -> bool:
        return routing_method == RoutingMethodType.DeepseekV4

    @staticmethod
    def _supports_router_logits_dtype(
        router_logits_dtype: torch.dtype | None, routing_method: RoutingMethodType
    ) -> bool:
        return True

    def supports_expert_map(self) -> bool:
        return False

    def moe_problem_size(
        self,
        a1: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> tuple[int, int, int, int, int]:
        experts, rows, hidden = self._w13.shape
        return experts, a1.shape[0], rows, hidden, topk_ids.shape[1]

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        if apply_router_weight_on_input:
            raise NotImplementedError(
                f"{type(self).__name__}: apply_router_weight_on_input = True; DeepSeek-V4 has False"
            )
        limit = self.quant_config.gemm1_clamp_limit
        output.copy_(moe_forward(hidden_states, self._w13, self._w2, topk_weights, topk_ids, limit))


class ReferenceExpertsMxfp4(_ReferenceExperts):
    """FP4 e2m1 with one E8M0 scale per 32 (the original checkpoint)."""

    @staticmethod
    def _supports_quant_scheme(
        weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return (weight_key, activation_key) == (kMxfp4Static, None)

    @staticmethod
    def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return dequantize_fp4(weight.view(torch.int8), scale.view(torch.float8_e8m0fnu))


class ReferenceExpertsInt4(_ReferenceExperts):
    """INT4, symmetric, one scale per group of 128 (compressed-tensors pack-quantized)."""

    @staticmethod
    def _supports_quant_scheme(
        weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return (weight_key, activation_key) == (kInt4Static, None)

    @staticmethod
    def weight_name(name: str) -> str:
        return f"{name}_weight_packed"

    @staticmethod
    def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return dequantize_int4(weight, scale)


def register_reference_experts() -> None:
    """Offer the experts to the oracles that the queue's patch opens to plugins. Idempotent."""
    from vllm.model_executor.layers.fused_moe.oracle import base

    for weight_format, cls in (("mxfp4", ReferenceExpertsMxfp4), ("wna16", ReferenceExpertsInt4)):
        classes = base.EXTERNAL_EXPERTS[weight_format]
        if cls not in classes:
            classes.append(cls)
