"""DeepSeek-V4's expert routing on a CPU, in plain PyTorch: see `attention.py`."""

from __future__ import annotations

import torch
from torch.nn import functional

# Shapes that the compiled ops are instantiated for (vLLM 0.32.0, csrc/cpu/sgl-kernels/topk.cpp).
COMPILED_NUM_EXPERTS = (64, 128, 256, 384)
COMPILED_TOPK = (6, 7, 8)


def _scores(gating_output: torch.Tensor, scoring_func: str) -> torch.Tensor:
    if scoring_func != "sqrtsoftplus":
        raise ValueError(
            f"routing: scoring_func = {scoring_func!r}; the reference has sqrtsoftplus"
        )
    return functional.softplus(gating_output.float()).sqrt()


def _renormalize(weights: torch.Tensor, factor: float) -> torch.Tensor:
    return weights / weights.sum(-1, keepdim=True) * factor


def biased_topk_cpu(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    num_fused_shared_experts: int,
    routed_scaling_factor: float | None,
    apply_routed_scaling_factor_on_output: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts with the best biased scores; their weights are the unbiased scores.

    Args:
        gating_output: (tokens, experts).
        correction_bias: float32 (experts,), steers the choice only.
    Returns:
        weights: float32 (tokens, topk), best first; ids: int32 (tokens, topk).
    Raises:
        ValueError: another scoring function, or shared experts fused into the routing.
    """
    if num_fused_shared_experts:
        raise ValueError(
            f"biased_topk_cpu: num_fused_shared_experts = {num_fused_shared_experts}; "
            "the reference has 0"
        )
    scores = _scores(gating_output, scoring_func)
    ids = torch.topk(scores + correction_bias.float(), topk, dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        factor = routed_scaling_factor if apply_routed_scaling_factor_on_output else 1.0
        weights = _renormalize(weights, 1.0 if factor is None else factor)
    return weights, ids.int()


def hash_topk_cpu(
    gating_output: torch.Tensor,
    tid2eid: torch.Tensor,
    topk: int,
    scoring_func: str,
    num_fused_shared_experts: int,
    num_experts: int,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts that a table gives for the token; weights from the router's scores.

    Args:
        gating_output: (tokens, experts).
        tid2eid: int32 (tokens, topk), the table's rows of these tokens.
    Returns:
        weights: float32 (tokens, topk); ids: int32 (tokens, topk).
    """
    if num_fused_shared_experts:
        raise ValueError(
            f"hash_topk_cpu: num_fused_shared_experts = {num_fused_shared_experts}; "
            "the reference has 0"
        )
    weights = _scores(gating_output, scoring_func).gather(1, tid2eid.long())
    return _renormalize(weights, routed_scaling_factor), tid2eid.to(torch.int32, copy=True)
