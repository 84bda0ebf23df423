"""Builds DeepSeek-V4 and its draft from a checkpoint as vLLM's worker would, up to the load."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

# A byte may be any code; a whole row of this one is no row of a checkpoint.
INTEGER_MARKS = {torch.int32: 0x07ABCDEF, torch.int64: -(1 << 40), torch.uint8: 0xA5}
# vLLM shares the target's when a checkpoint has none.
SHARED = ("embed_tokens.weight", "shared_head.head.weight")


@dataclass(frozen=True)
class Rank:
    """One process of a tensor-parallel group, and how the group's processes find each other."""

    rank: int = 0
    world_size: int = 1
    rendezvous: Path | None = None
    expert_parallel: bool = False


ALONE = Rank()


def make_configs(
    folder: Path, rank: Rank = ALONE, moe_backend: str = "auto"
) -> tuple[Any, dict[str, Any]]:
    """(vLLM config, {"target": model config, "draft": its model config})."""
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        KernelConfig,
        LoadConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        SpeculativeConfig,
        VllmConfig,
    )

    target = ModelConfig(
        model=str(folder),
        tokenizer=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        enforce_eager=True,
    )
    parallel = ParallelConfig(
        tensor_parallel_size=rank.world_size,
        enable_expert_parallel=rank.expert_parallel,
        distributed_executor_backend="mp" if rank.world_size > 1 else None,
        rank=rank.rank,
    )
    speculative = SpeculativeConfig(
        method="mtp",
        num_speculative_tokens=1,
        target_model_config=target,
        target_parallel_config=parallel,
    )
    config = VllmConfig(
        model_config=target,
        parallel_config=parallel,
        speculative_config=speculative,
        cache_config=CacheConfig(block_size=256, cache_dtype="fp8"),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=1024,
            max_num_seqs=4,
            max_model_len=1024,
            is_encoder_decoder=False,
        ),
        device_config=DeviceConfig("cpu"),
        load_config=LoadConfig(),
        kernel_config=KernelConfig(moe_backend=moe_backend),
    )
    config.cache_config.cache_dtype = "fp8_ds_mla"
    return config, {"target": target, "draft": speculative.draft_model_config}


@cache
def initialize_distributed(rank: Rank) -> None:
    """This process's place in the group, once per process; a vLLM config must be set."""
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    rendezvous = rank.rendezvous or Path(tempfile.mkdtemp()) / "rendezvous"
    init_distributed_environment(
        rank.world_size, rank.rank, f"file://{rendezvous}", rank.rank, "gloo"
    )
    initialize_model_parallel(rank.world_size, 1)


def construct(config: Any, model_config: Any, rank: Rank = ALONE) -> nn.Module:
    """The model that vLLM's registry names for this config, with unset parameters."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    context = config.compilation_config
    context.static_forward_context.clear()
    context.static_all_moe_layers.clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(config):
            initialize_distributed(rank)
            return initialize_model(vllm_config=config, model_config=model_config)
    finally:
        torch.set_default_dtype(torch.float32)


def load(model: nn.Module, model_config: Any) -> set[str]:
    """Run the model's own `load_weights` on the checkpoint; names that it reports as loaded."""
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    loader = get_model_loader(LoadConfig(use_tqdm_on_load=False))
    return model.load_weights(loader.get_all_weights(model_config, model))


def process_experts(model: nn.Module) -> None:
    """Lay out routed experts that a plugin offered, as vLLM does after the load.

    Its own need kernels for that.
    """
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    for module in model.modules():
        if not isinstance(module, RoutedExperts):
            continue
        backend = getattr(module.quant_method, "wna16_backend", None)
        if getattr(backend, "value", None) == "EXTERNAL":
            module.quant_method.process_weights_after_loading(module)


def mark(model: nn.Module) -> None:
    """Fill every parameter with a value that no checkpoint tensor holds."""
    for parameter in model.parameters():
        data = parameter.data
        if data.dtype == torch.float8_e4m3fn:
            data.view(torch.uint8).fill_(0x7F)  # NaN
        elif data.is_floating_point():
            data.fill_(float("nan"))
        else:
            data.fill_(INTEGER_MARKS[data.dtype])


def still_marked(model: nn.Module) -> list[str]:
    """Parameters of which at least one element was not loaded."""
    names = []
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_sink", *SHARED)):  # padded heads keep their first value
            continue
        data = parameter.data
        if data.is_floating_point():
            unset = torch.isnan(data.float()).any()
        else:
            marked = data == INTEGER_MARKS[data.dtype]
            unset = (marked.all(-1) if data.dtype == torch.uint8 else marked).any()
        if unset:
            names.append(name)
    return names
