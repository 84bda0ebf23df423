"""vLLM's entry into this package: the `vllm.general_plugins` entry point `dsv4_maxq`.

vLLM calls `register` in every process before it builds a model; it must be idempotent.
"""


def register() -> None:
    """Register what this project adds to vLLM on the current platform."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from kernels.cpu.register import register_cpu

        register_cpu()
    elif current_platform.is_cuda():
        from kernels.nvidia.register import register_nvidia

        register_nvidia()
    register_capture()


def register_capture() -> None:
    """Take the MTP class that records its experts' inputs, when a capture is asked for.

    Raises:
        ValueError: the capture's folder does not exist.
    """
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    from kernels.capture import capture_folder

    if capture_folder() is None:
        return
    package = "cpu" if current_platform.is_cpu() else "nvidia"
    ModelRegistry.register_model(
        "DeepSeekV4MTPModel", f"kernels.{package}.capture:CapturingDeepSeekV4MTP"
    )
