"""Everything this project adds to vLLM on an NVIDIA GPU, in one call."""

from __future__ import annotations


def register_nvidia() -> None:
    """Register the strictly loading model classes, whose module offers our experts. Idempotent."""
    from vllm import ModelRegistry

    # By name: importing the classes here would initialize CUDA before vLLM does.
    for architecture, name in (
        ("DeepseekV4ForCausalLM", "DeepseekV4ForCausalLM"),
        ("DeepSeekV4MTPModel", "DeepSeekV4MTP"),
    ):
        ModelRegistry.register_model(architecture, f"kernels.nvidia.models:{name}")
