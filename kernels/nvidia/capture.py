"""The MTP head on NVIDIA GPUs with its experts' inputs recorded: see `kernels/capture.py`.

It must run eagerly: hooks do not run inside CUDA graphs.
"""

from __future__ import annotations

from vllm.config import VllmConfig

from kernels.capture import attach, capture_folder
from kernels.nvidia.models import DeepSeekV4MTP


class CapturingDeepSeekV4MTP(DeepSeekV4MTP):
    """The draft, with the hook; the same weights and the same results."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        recorder = attach(self, vllm_config, capture_folder())
        if recorder is not None:
            recorder.start()
