"""Which `torch.ops._C` ops of DeepSeek-V4 run compiled on this CPU, and which as reference.

vLLM 0.32.0 ships three x86 libraries; the DeepSeek-V4 ops are compiled into the AVX-512 + AMX
one only. `register_reference_ops` defines the reference op wherever the compiled one is absent,
or the CPU has no AMX, which the compiled ones need. `DSV4_CPU_OPS` overrides this for tests:

    auto       (default) compiled where it can run, else reference
    reference  reference everywhere
    compiled   compiled everywhere; an error where it cannot run
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch

from kernels.cpu import attention, compressor, hyper, indexer, routing

ENV = "DSV4_CPU_OPS"


class OpsChoice(StrEnum):
    AUTO = "auto"
    REFERENCE = "reference"
    COMPILED = "compiled"

    @classmethod
    def from_env(cls) -> OpsChoice:
        """Raises ValueError naming the variable, its value and the values allowed."""
        value = os.environ.get(ENV, cls.AUTO.value)
        try:
            return cls(value)
        except ValueError:
            allowed = ", ".join(choice.value for choice in cls)
            raise ValueError(f"{ENV} = {value!r}; one of {allowed} is needed") from None


# Signatures as the compiled library registers them, so that callers see no difference.
SCHEMAS: dict[str, str] = {
    "convert_weight_packed": "(Tensor! weight) -> Tensor",
    "bmm_cpu": "(Tensor(a!) out, Tensor mat1, Tensor mat2, bool is_vnni, Tensor? scale) -> ()",
    "weight_packed_linear": (
        "(Tensor(a0!) out, Tensor(a1) mat1, Tensor(a2) mat2, Tensor(a3)? bias, bool is_vnni) -> ()"
    ),
    "fused_qnorm_rope_kv_insert_cpu": (
        "(Tensor q, Tensor kv, Tensor positions, Tensor(a!) swa_kv_cache_2d, Tensor slot_mapping,"
        " Tensor cos_sin_cache, int q_head_padded, float eps, int cache_block_size) -> Tensor"
    ),
    "flash_mla_with_kvcache_cpu": (
        "(Tensor(a!) out, Tensor q, Tensor window_cache_2d, Tensor window_slots,"
        " int window_block_size, Tensor compressed_cache_2d, Tensor compressed_slots,"
        " int compressed_block_size, Tensor attn_sink, float scale) -> ()"
    ),
    "inverse_gptj_rope_o_proj_cpu": (
        "(Tensor o, Tensor positions, Tensor cos_sin_cache, int rope_dim) -> Tensor"
    ),
    "save_partial_states_cpu": (
        "(Tensor kv, Tensor score, Tensor ape, Tensor positions, Tensor(a!) state_cache,"
        " Tensor slot_mapping) -> ()"
    ),
    "compress_norm_rope_store_cpu": (
        "(Tensor state_cache, Tensor gather_slots, Tensor positions, Tensor kv_slot_mapping,"
        " Tensor rms_norm_weight, float rms_norm_eps, Tensor cos_sin_cache,"
        " Tensor(a!) kv_cache_2d, int kv_cache_block_size, int compress_ratio) -> ()"
    ),
    "compress_norm_rope_store_indexer_cpu": (
        "(Tensor state_cache, Tensor gather_slots, Tensor positions, Tensor kv_slot_mapping,"
        " Tensor rms_norm_weight, float rms_norm_eps, Tensor cos_sin_cache,"
        " Tensor(a!) kv_cache_2d, int kv_cache_block_size, int compress_ratio) -> ()"
    ),
    "fused_indexer_q_rope_quant_cpu": (
        "(Tensor positions, Tensor index_q, Tensor index_q_cos_sin_cache, Tensor(a!) index_q_fp8,"
        " Tensor index_weights, float index_weights_softmax_scale,"
        " float index_weights_head_scale, Tensor(b!) index_weights_out) -> ()"
    ),
    "fp8_paged_mqa_logits_cpu": (
        "(Tensor q_fp8, Tensor kvcache_fp8, Tensor weight, Tensor seq_lens, Tensor page_table,"
        " int block_size, int max_seq_len) -> Tensor"
    ),
    "topk_transform_512_cpu": (
        "(Tensor scores, Tensor seq_lens, Tensor page_tables, Tensor(a!) out_page_indices,"
        " int page_size, Tensor(b!)? out_raw_indices) -> ()"
    ),
    "biased_topk_cpu": (
        "(Tensor hidden_states, Tensor gating_output, Tensor correction_bias, int topk,"
        " bool renormalize, str scoring_func, int num_fused_shared_experts,"
        " float? routed_scaling_factor, bool apply_routed_scaling_factor_on_output)"
        " -> (Tensor, Tensor)"
    ),
    "hash_topk_cpu": (
        "(Tensor gating_output, Tensor tid2eid, int topk, str scoring_func,"
        " int num_fused_shared_experts, int num_experts, float routed_scaling_factor)"
        " -> (Tensor, Tensor)"
    ),
    "hc_pre_fused_cpu": (
        "(Tensor x, Tensor hc_fn, Tensor hc_scale, Tensor hc_base, int hc_mult,"
        " int sinkhorn_iters, float rms_eps, float hc_eps) -> (Tensor, Tensor, Tensor)"
    ),
    "hc_post_fused_cpu": "(Tensor x, Tensor residual, Tensor post, Tensor comb) -> Tensor",
    "hc_head_fused_cpu": (
        "(Tensor x, Tensor hc_fn, Tensor hc_scale, Tensor hc_base, float hc_eps, float norm_eps)"
        " -> Tensor"
    ),
}

_MODULES = (attention, compressor, indexer, hyper, routing)
REFERENCE: dict[str, Callable[..., Any]] = {
    name: next(getattr(module, name) for module in _MODULES if hasattr(module, name))
    for name in SCHEMAS
}

# A registration lives as long as its Library object.
_library: torch.library.Library | None = None
_chosen: dict[str, str] = {}


def compiled_kernel(name: str) -> Callable[..., Any] | None:
    """The compiled CPU kernel of `_C::name`, or None where vLLM's library lacks it."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"_C::{name}", "CPU"):
        return None
    kernel = torch.library.get_kernel(f"_C::{name}", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return lambda *args: kernel.call_boxed(keys, *args)


# Positions of the router's scores (tokens, experts) and of topk among the arguments.
_SHAPE_ARGUMENTS = {"biased_topk_cpu": (1, 3), "hash_topk_cpu": (0, 2)}


def _by_shape(
    name: str, compiled: Callable[..., Any], reference: Callable[..., Any]
) -> Callable[..., Any]:
    """The compiled routing ops exist for a few shapes only; the reference takes the others."""
    scores_at, topk_at = _SHAPE_ARGUMENTS[name]

    def route(*args: Any) -> Any:
        fits = (
            args[scores_at].shape[1] in routing.COMPILED_NUM_EXPERTS
            and args[topk_at] in routing.COMPILED_TOPK
        )
        return (compiled if fits else reference)(*args)

    return route


def chosen_ops() -> dict[str, str]:
    """What runs in this process: op name -> "compiled", "reference" or "by shape"."""
    return dict(_chosen)


def register_reference_ops() -> None:
    """Define or override `torch.ops._C` ops for this CPU; a second call changes nothing.

    Raises:
        ValueError: DSV4_CPU_OPS has an unknown value.
        RuntimeError: DSV4_CPU_OPS=compiled where a compiled op is absent or the CPU has no AMX.
    """
    from vllm.platforms import current_platform

    global _library
    choice = OpsChoice.from_env()
    if _library is not None:
        return
    current_platform.import_kernels()
    amx = torch.cpu._is_amx_tile_supported()
    library = torch.library.Library("_C", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        absent = not hasattr(torch.ops._C, name)
        compiled = None if absent or not amx else compiled_kernel(name)
        if choice is OpsChoice.COMPILED and compiled is None:
            raise RuntimeError(
                f"{ENV} = compiled: {name} is absent from vLLM's library or the CPU lacks AMX"
            )
        implementation = REFERENCE[name]
        _chosen[name] = "reference"
        if compiled is not None and choice is not OpsChoice.REFERENCE:
            if name not in _SHAPE_ARGUMENTS:
                _chosen[name] = "compiled"
                continue
            implementation = _by_shape(name, compiled, implementation)
            _chosen[name] = "by shape"
        if absent:
            library.define(name + schema)
        library.impl(name, implementation, "CPU", allow_override=True)
    _library = library
