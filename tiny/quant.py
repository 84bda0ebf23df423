"""Fake quantization: the rounding of the stored formats, with a straight-through gradient.

Training with these makes the exported FP4/FP8 checkpoint the model that was trained; the same
functions simulate the engine's FP8 caches at inference.
"""

from __future__ import annotations

import torch

from kernels.formats import FP4_GROUP, FP4_MAX, FP8_BLOCK, FP8_MAX, ue8m0_scale

CACHE_ABSMAX_FLOOR = 1e-4


def _straight_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    return x + (rounded.to(x.dtype) - x).detach()


@torch.no_grad()
def _round_e2m1(x: torch.Tensor) -> torch.Tensor:
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = torch.round(magnitude / step) * step  # ties to even, as e2m1 codes
    return torch.copysign(rounded.clamp(max=FP4_MAX), x)


def fake_fp4(weight: torch.Tensor) -> torch.Tensor:
    """Round to FP4 e2m1 with an E8M0 scale per 32 values of the last dimension.

    Args:
        weight: floating, last dimension a multiple of 32 (leading dimensions are free).
    Returns:
        same shape and dtype; equals `dequantize_fp4(*quantize_fp4(weight))`.
    """
    groups = weight.detach().float().unflatten(-1, (-1, FP4_GROUP))
    scale = ue8m0_scale(groups.abs().amax(dim=-1, keepdim=True), FP4_MAX)
    rounded = _round_e2m1(groups / scale) * scale
    return _straight_through(weight, rounded.flatten(-2))


def fake_fp8_block(weight: torch.Tensor) -> torch.Tensor:
    """Round to FP8 e4m3 in 128 x 128 blocks with E8M0 scales.

    Args:
        weight: floating matrix, both dimensions multiples of 128.
    Returns:
        same shape and dtype; equals `dequantize_fp8_block(*quantize_fp8_block(weight))`.
    """
    out_features, in_features = weight.shape
    blocks = (
        weight.detach()
        .float()
        .view(out_features // FP8_BLOCK, FP8_BLOCK, in_features // FP8_BLOCK, FP8_BLOCK)
    )
    scale = ue8m0_scale(blocks.abs().amax(dim=(1, 3), keepdim=True), FP8_MAX)
    rounded = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return _straight_through(weight, rounded.view(out_features, in_features))


def fake_bf16(weight: torch.Tensor) -> torch.Tensor:
    """Round to bfloat16 and back."""
    return _straight_through(weight, weight.detach().to(torch.bfloat16))


def fake_fp8_groups(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Round activations as the engine's FP8 caches do.

    The value goes through bfloat16, then e4m3 with one power-of-two scale per group of the last
    dimension; a group's absmax is taken as at least 1e-4.

    Args:
        x: floating, last dimension a multiple of group_size.
        group_size: 64 for the key-value cache, 128 for the indexer's queries and keys.
    Source: vLLM `common/ops/fused_compress_quant_cache.py`, `common/ops/fused_indexer_q.py`.
    """
    groups = x.detach().to(torch.bfloat16).float().unflatten(-1, (-1, group_size))
    absmax = groups.abs().amax(dim=-1, keepdim=True).clamp_min(CACHE_ABSMAX_FLOOR)
    scale = ue8m0_scale(absmax, FP8_MAX)
    scaled = (groups / scale).clamp(-FP8_MAX, FP8_MAX)
    rounded = scaled.to(torch.float8_e4m3fn).float() * scale
    return _straight_through(x, rounded.flatten(-2))


def fake_kv_cache(kv: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """Round key-values as the `fp8_ds_mla` cache stores them.

    Args:
        kv: (..., head_dim), RoPE already applied to the last `rope_dim` dimensions.
        rope_dim: these stay bfloat16; the others become FP8 in groups of 64.
    Source: vLLM `common/ops/fused_compress_quant_cache.py`, 448 FP8 + 64 bfloat16.
    """
    nope, rope = kv[..., :-rope_dim], kv[..., -rope_dim:]
    return torch.cat((fake_fp8_groups(nope, 64), fake_bf16(rope)), dim=-1)
