"""Lets vLLM's CUDA classes be built on a machine that has no GPU.

`install` replaces `vllm.platforms.current_platform` by a CUDA platform of a chosen compute
capability whose tensors live on the CPU, and stubs the compiled extensions, CUDA streams and
DeepGEMM. Constructors, the choice of quantization schemes and `load_weights` then run unchanged;
no kernel can run. It must be called before anything else of vLLM is imported, in a process of its
own.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import torch

EXTENSIONS = (
    "vllm._C",
    "vllm._C_stable_libtorch",
    "vllm._moe_C",
    "vllm._moe_C_stable_libtorch",
    "vllm._flashmla_C",
    "vllm._flashmla_extension_C",
    "vllm.cumem_allocator",
)
SUPPORT_QUERIES = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_group_gemm_supported",
)
FLASH_MLA = "vllm.third_party.flashmla.flash_mla_interface"
ACTIVATION_OPS = (
    "silu_and_mul(Tensor(a!) out, Tensor x) -> ()",
    "silu_and_mul_with_clamp(Tensor(a!) out, Tensor x, float limit) -> ()",
    "rms_norm(Tensor(a!) out, Tensor x, Tensor w, float eps) -> ()",
    "fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor w, float eps) -> ()",
    "rotary_embedding(Tensor p, Tensor(a!) q, Tensor(b!)? k, int h, Tensor c, bool n) -> ()",
)


class NoOp:
    """A CUDA stream or event that does nothing."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class AnyModule(types.ModuleType):
    """A module in which every public attribute is a function that returns None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def stub_torch() -> None:
    torch.cuda.Stream = torch.cuda.Event = NoOp
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_available = lambda: False


def stub_extensions() -> torch.library.Library:
    """Returns the op library, which the caller keeps alive."""
    for name in EXTENSIONS:
        sys.modules[name] = types.ModuleType(name)
    flash = AnyModule("vllm.vllm_flash_attn")
    flash.__path__ = []
    sys.modules["vllm.vllm_flash_attn"] = flash
    for name in ("vllm.vllm_flash_attn.flash_attn_interface", FLASH_MLA):
        sys.modules[name] = AnyModule(name)  # the CPU wheel has no FLASH_MLA
    sys.modules[FLASH_MLA].FlashMLASchedMeta = type("FlashMLASchedMeta", (), {})
    library = torch.library.Library("_C", "FRAGMENT")
    for name in SUPPORT_QUERIES:
        library.define(f"{name}(int capability) -> bool")
        library.impl(name, lambda capability: True, "CompositeExplicitAutograd")
    for schema in ACTIVATION_OPS:
        library.define(schema)
    return library


def fake_platform(capability: tuple[int, int]) -> None:
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class FakeCuda(NonNvmlCudaPlatform):
        device_type = "cpu"
        device_name = "cuda"
        dispatch_key = "CPU"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "fake"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 96 << 30

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 188

        @classmethod
        def is_fully_connected(cls, device_ids: list[int]) -> bool:
            return False

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            # CUDA's own would start NCCL; a load needs no collective operation.
            module = "vllm.distributed.device_communicators.base_device_communicator"
            return f"{module}.DeviceCommunicatorBase"

        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            pass

        @classmethod
        def verify_quantization(cls, quantization: str) -> None:
            pass

        @classmethod
        def set_device(cls, device: Any) -> None:
            pass

    vllm.platforms._current_platform = FakeCuda()


def stub_kernel_packages() -> None:
    import vllm.model_executor.models.registry as registry
    import vllm.utils.deep_gemm as deep_gemm
    import vllm.utils.flashinfer as flashinfer
    import vllm.utils.import_utils as import_utils

    for name in dir(flashinfer):
        if name.startswith("has_flashinfer_sparse_mla_sm120"):
            setattr(flashinfer, name, lambda *args, **kwargs: True)
    import_utils.has_deep_gemm = deep_gemm.has_deep_gemm = lambda: True
    deep_gemm.is_deep_gemm_supported = lambda: True
    deep_gemm._lazy_init = lambda: None
    deep_gemm._fp8_gemm_nt_impl = lambda *args, **kwargs: None
    # Model classes are inspected in a subprocess, which would not have the fake platform.
    registry._run_in_subprocess = lambda function: function()


def install(capability: tuple[int, int] = (12, 0)) -> None:
    """Make vLLM believe that it runs on one CUDA device."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_PLUGINS"] = ""
    stub_torch()
    install.library = stub_extensions()
    fake_platform(capability)
    stub_kernel_packages()
