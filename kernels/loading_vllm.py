"""The strict loader inside vLLM: what it needs to know of a model, and the report at the end."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from kernels.cpu import LOGGER
from kernels.full_sizes import FullSizes
from kernels.load_record import RECORD, describe, summary
from kernels.loading import Part, StrictLoader


def int4_group_size(model: nn.Module) -> int | None:
    """Input features that share an INT4 scale, as the engine will compute; None without INT4.

    Raises:
        RuntimeError: layers differ.
    """
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    sizes = {size for method in methods if (size := getattr(method, "group_size", None))}
    if len(sizes) > 1:
        raise RuntimeError(f"strict load: INT4 experts with group_size {sorted(sizes)}; must agree")
    return next(iter(sizes), None)


def load_strictly(
    model: nn.Module, part: Part, weights: Iterable[tuple[str, torch.Tensor]]
) -> set[str]:
    """Fill a DeepSeek-V4 target or draft of vLLM, log what it is and record it.

    Returns:
        names of the parameters that were filled.
    Raises:
        ValueError: the weights and the parameters differ; see `StrictLoader.load`.
        RuntimeError: the model is cut into pipeline stages, which are not counted here.
    """
    from vllm.distributed import get_pp_group, get_tp_group
    from vllm.logger import init_logger

    if get_pp_group().world_size != 1:
        raise RuntimeError("strict load: pipeline stages are not supported; use tensor parallelism")
    group = get_tp_group()
    loader = StrictLoader(
        model,
        part,
        num_experts=model.config.n_routed_experts,
        first_layer=model.config.num_hidden_layers,
        tp_rank=group.rank_in_group,
        tp_size=group.world_size,
        sizes=FullSizes(model.config.to_dict(), int4_group_size(model)),
    )
    report = loader.load(weights)
    entry = describe(model, report, group)
    init_logger(LOGGER).info_once("%s", summary(part, entry))
    RECORD.add(part.name.lower(), entry, write=group.rank_in_group == 0)
    return report.parameters
