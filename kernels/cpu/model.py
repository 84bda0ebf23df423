"""DeepSeek-V4 on a CPU: vLLM's class, loaded strictly.

Registered in place of vLLM's own under the same architecture name, so no patch is needed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.models.deepseek_v4.cpu.model import DeepseekV4ForCausalLM as VllmTarget

from kernels.loading import Part, is_mtp_name
from kernels.loading_vllm import load_strictly


class DeepseekV4ForCausalLM(VllmTarget):
    """vLLM's target; every parameter is loaded, or the load fails with the names."""

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        return is_mtp_name(name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_strictly(self, Part.TARGET, weights)
