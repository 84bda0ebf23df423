"""vLLM's Marlin over our weights: the same bytes, for batches at which it is measured to be faster.

Its tiles and scales are ours; only the rows of w13 lie in another order, which its first GEMM does
not care about. So between its GEMMs stands `dsv4_maxq::silu_interleaved`; all else is vLLM's.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm._custom_ops as vllm_ops
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
from vllm.scalar_type import scalar_types

from kernels import ops
from kernels.weights import INT4_GROUP


def can_read(hidden_size: int, inter_size: int) -> bool:
    """Whether Marlin reads scales in our order: with a single group it reads them in another."""
    return min(hidden_size, inter_size) > INT4_GROUP


def moe(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    swiglu_limit: float | None,
    out: torch.Tensor,
) -> None:
    """`ops.moe_w4a16` by Marlin. Arguments as there; ids must all be of experts.

    Buffers come from torch's allocator for each call, and locks from vLLM, which keeps some for
    each stream: calls on several streams share nothing.
    """

    def activation(_: Any, act: torch.Tensor, gate_up: torch.Tensor, **__: Any) -> None:
        ops.silu_interleaved(gate_up, swiglu_limit, out=act)

    def sum_slots(slots: torch.Tensor, total: torch.Tensor, *_: Any) -> None:
        vllm_ops.moe_sum(slots, total)

    fused_marlin_moe(
        hidden,
        w13,
        w2,
        bias1=None,
        bias2=None,
        w1_scale=w13_scale,
        w2_scale=w2_scale,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        quant_type_id=scalar_types.uint4b8.id,
        activation_func=activation,
        moe_sum=sum_slots,
        output=out,
    )
