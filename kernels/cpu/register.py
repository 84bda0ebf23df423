"""Everything this project adds to vLLM on a CPU, in one call."""

from __future__ import annotations


def register_cpu() -> None:
    """Register ops, metadata kernels, layers, experts and the MTP head. Idempotent."""
    from vllm import ModelRegistry

    from kernels.cpu.experts import register_reference_experts
    from kernels.cpu.linear import register_reference_linear
    from kernels.cpu.metadata import register_metadata_kernels
    from kernels.cpu.ops import OpsChoice, register_reference_ops

    register_reference_ops()
    register_metadata_kernels()
    register_reference_linear(prefer=OpsChoice.from_env() is OpsChoice.REFERENCE)
    register_reference_experts()
    # By name, so that nothing is imported yet. vLLM's own MTP class on a CPU is a stub that raises.
    ModelRegistry.register_model("DeepseekV4ForCausalLM", "kernels.cpu.model:DeepseekV4ForCausalLM")
    ModelRegistry.register_model("DeepSeekV4MTPModel", "kernels.cpu.mtp:DeepSeekV4MTP")
