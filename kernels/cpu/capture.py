"""The MTP head on a CPU with its experts' inputs recorded: see `kernels/capture.py`."""

from __future__ import annotations

from kernels.capture import Capturing
from kernels.cpu.mtp import DeepSeekV4MTP


class CapturingDeepSeekV4MTP(Capturing, DeepSeekV4MTP):
    """What vLLM loads in the place of the head while a capture is asked for."""
