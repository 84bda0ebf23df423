"""DeepSeek-V4 and its MTP head on NVIDIA GPUs: vLLM's classes, loaded strictly.

Registered in place of vLLM's own under the same architecture names, so no patch is needed: what
they add is the load, the head's own view of the quantization config, and the offer of our experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.models.deepseek_v4.nvidia.model import DeepseekV4ForCausalLM as VllmTarget
from vllm.models.deepseek_v4.nvidia.mtp import DeepSeekV4MTP as VllmDraft
from vllm.platforms import current_platform
from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

from kernels.loading import Part, is_mtp_name
from kernels.loading_vllm import load_strictly
from kernels.nvidia.experts import offer_experts
from kernels.nvidia.guards import check_fp8_kernels
from kernels.quant_targets import use_vllm_names

# Here and not in the plugin's `register`, which every process calls: vLLM's experts are imported
# with the models only, in the process that builds one.
offer_experts()


def check(model: nn.Module) -> None:
    """Refuse kernels that would compute wrong numbers on this GPU."""
    capability = current_platform.get_device_capability()
    check_fp8_kernels(model, capability.major, is_deep_gemm_e8m0_used())


class DeepseekV4ForCausalLM(VllmTarget):
    """vLLM's target; every parameter is loaded, or the load fails with the names."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        check(self)

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        return is_mtp_name(name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = load_strictly(self, Part.TARGET, weights)
        self.process_weights_after_loading()
        return loaded


class DeepSeekV4MTP(VllmDraft):
    """vLLM's draft, loaded strictly, with quantization targets that may say `mtp.0.`."""

    # As the target has it: the head must resolve its fused modules by itself.
    packed_modules_mapping = VllmTarget.packed_modules_mapping

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        use_vllm_names(vllm_config.quant_config, vllm_config.model_config.hf_config.to_dict())
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        check(self)

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        return not is_mtp_name(name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = load_strictly(self, Part.DRAFT, weights)
        self.process_weights_after_loading()
        return loaded
