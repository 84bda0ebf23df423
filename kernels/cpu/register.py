"""Everything this project adds to vLLM on a CPU, in one call."""

from __future__ import annotations

from collections import Counter


def register_cpu() -> None:
    """Register ops, metadata kernels, layers, experts and the MTP head. Idempotent."""
    from vllm import ModelRegistry
    from vllm.logger import init_logger

    from kernels.cpu import LOGGER
    from kernels.cpu.experts import register_reference_experts
    from kernels.cpu.linear import register_reference_linear
    from kernels.cpu.metadata import register_metadata_kernels
    from kernels.cpu.ops import OpsChoice, register_reference_ops

    logger = init_logger(LOGGER)
    chosen = register_reference_ops()
    counts = Counter(chosen.values())
    logger.info_once(
        "DeepSeek-V4 CPU ops: %s", ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
    )
    register_metadata_kernels()
    register_reference_linear(prefer=OpsChoice.from_env() is OpsChoice.REFERENCE)
    register_reference_experts()
    # By name: vLLM's own MTP class on a CPU is a stub that raises.
    ModelRegistry.register_model("DeepSeekV4MTPModel", "kernels.cpu.mtp:DeepSeekV4MTP")
