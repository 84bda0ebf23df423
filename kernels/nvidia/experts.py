"""DeepSeek-V4's routed INT4 experts on an NVIDIA GPU: our kernels, behind vLLM's interface.

One copy of the weights, laid out once at load, serves our kernels and vLLM's Marlin; a measured
table says which of them computes a batch (`kernels/dispatch.py`). The number of tokens is known on
the host, also while a CUDA graph is captured, so each graph holds the kernels of its own size.
"""

from __future__ import annotations

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey, kInt4Static
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from kernels import ops
from kernels.cpu import LOGGER
from kernels.dispatch import Kernel
from kernels.experts_base import WholeLayerExperts
from kernels.nvidia import marlin, selection
from kernels.nvidia.tile_in_place import tile_scale_in_place, tile_weight_in_place
from kernels.weights import CODES_PER_WORD

LOG = init_logger(LOGGER)


class Dsv4MaxqExperts(WholeLayerExperts):
    """INT4, symmetric, groups of 128: `dsv4_maxq::moe_w4a16`, or Marlin where that is faster."""

    def __init__(self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig) -> None:
        super().__init__(moe_config, quant_config)
        self.dispatch = selection.choose_dispatch(moe_config)
        self.swiglu_limit = self.activation_config.clamp_limit
        self._w13_scale: torch.Tensor | None = None
        self._w2_scale: torch.Tensor | None = None

    # ------------------------------------------------------------------------- what it serves

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        """Whether a layer is ours, with the reason if not.

        Raises:
            RuntimeError: it is, but the shared library is missing, stale or made for another GPU.
        """
        try:
            selection.choose_dispatch(moe_config)
        except selection.NotServed as refusal:
            supported, reason = False, str(refusal)
        else:
            supported, reason = mk.FusedMoEExpertsModular.is_supported_config(
                cls, moe_config, weight_key, activation_key, activation_format
            )
        if supported:
            selection.require_library()
        elif selection.is_automatic(moe_config):
            LOG.warning_once("INT4 experts: vLLM's own serve, not %s: %s", cls.__name__, reason)
        return supported, reason

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cuda()

    @staticmethod
    def _supports_quant_scheme(
        weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return (weight_key, activation_key) == (kInt4Static, None)

    # -------------------------------------------------------------------------------- weights

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Lay out a layer's weights and scales for the kernels, where they lie.

        Raises:
            ValueError: they are not as compressed-tensors stores them, for instance because they
                are laid out already.
        """
        config = self.moe_config
        hidden, inter = config.hidden_dim, config.intermediate_size_per_partition
        experts = config.num_local_experts
        for name, size_n, size_k in (("w13", 2 * inter, hidden), ("w2", hidden, inter)):
            weight = getattr(layer, f"{name}_weight_packed").data
            scale = getattr(layer, f"{name}_weight_scale").data
            stored = (experts, size_n, size_k // CODES_PER_WORD)
            if tuple(weight.shape) != stored or scale.shape[:2] != stored[:2]:
                raise ValueError(
                    f"{type(self).__name__}: {name}_weight_packed has shape {tuple(weight.shape)}, "
                    f"its scale {tuple(scale.shape)}; {stored} is needed, as stored"
                )
            gated = name == "w13"
            replace_parameter(layer, f"{name}_weight_packed", tile_weight_in_place(weight, gated))
            replace_parameter(layer, f"{name}_weight_scale", tile_scale_in_place(scale, gated))
            # vLLM hands the weights to `apply` under this name.
            setattr(layer, f"{name}_weight", getattr(layer, f"{name}_weight_packed"))
        self._w13_scale, self._w2_scale = layer.w13_weight_scale, layer.w2_weight_scale
        self._log_dispatch()

    @property
    def w1_scale(self) -> torch.Tensor | None:
        """Of w13, laid out; `quant_config` still has the shape as stored."""
        return self._w13_scale

    @property
    def w2_scale(self) -> torch.Tensor | None:
        return self._w2_scale

    def _log_dispatch(self) -> None:
        device, measured = selection.this_device(), self.dispatch.measured_on
        if measured is None:
            LOG.warning_once("INT4 experts: %s: %s", str(self.dispatch), self.dispatch.source)
            return
        LOG.info_once("INT4 experts: %s (%s)", str(self.dispatch), self.dispatch.source)
        if measured != device:
            LOG.warning_once(
                "INT4 experts: that was measured on %s; `python -m bench.kernels --dispatch-table` "
                "measures it on this %s",
                measured.name,
                device.name,
            )

    # -------------------------------------------------------------------------------- a batch

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[int, int, int, int, int]:
        inter = self.moe_config.intermediate_size_per_partition
        return w1.shape[0], a1.shape[0], 2 * inter, a1.shape[1], topk_ids.shape[1]

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
        """Write the layer's output of a batch.

        Raises:
            ValueError: an expert map, route weights on the input, or what the operators refuse.
        """
        if expert_map is not None or apply_router_weight_on_input:
            raise ValueError(
                f"{type(self).__name__}: expert_map = {expert_map}, apply_router_weight_on_input = "
                f"{apply_router_weight_on_input}; no map and False are supported"
            )
        is_ours = self.dispatch.kernel(hidden_states.shape[0]) is Kernel.OURS
        moe = ops.moe_w4a16 if is_ours else marlin.moe
        moe(
            hidden_states,
            topk_ids,
            topk_weights,
            w1,
            self._w13_scale,
            w2,
            self._w2_scale,
            self.swiglu_limit,
            out=output,
        )


def offer_experts() -> None:
    """Offer them to the oracle that the queue's patch opens to plugins. Idempotent."""
    from vllm.model_executor.layers.fused_moe.oracle import base

    classes = base.EXTERNAL_EXPERTS["wna16"]
    if Dsv4MaxqExperts not in classes:
        classes.append(Dsv4MaxqExperts)
