"""The MTP head on NVIDIA GPUs with its experts' inputs recorded: see `kernels/capture.py`.

It must run eagerly: hooks do not run inside CUDA graphs.
"""

from __future__ import annotations

from kernels.capture import Capturing
from kernels.nvidia.models import DeepSeekV4MTP


class CapturingDeepSeekV4MTP(Capturing, DeepSeekV4MTP):
    """What vLLM loads in the place of the head while a capture is asked for."""
