"""DeepSeek-V4's KV compressor on a CPU, in plain PyTorch: see `attention.py` for the contract.

A group of `ratio` tokens becomes one key: a softmax over the group, per channel, weighs the
tokens' `kv`. With overlap (ratio 4) the softmax also spans the group before, whose tokens then
use the first half of their `kv` and `score` and the group's own tokens the second half.

State cache, float32 (blocks, B, 2 * w): per token `kv` (w) | `score + ape[position % ratio]` (w).
"""

from __future__ import annotations

import torch

from kernels.cpu.attention import MIN_SCALE, ROPE_DIM, rotate, write_ds_mla
from kernels.formats import FP8_MAX, ue8m0_scale

INDEX_DIM = 128


def save_partial_states_cpu(
    kv: torch.Tensor,
    score: torch.Tensor,
    ape: torch.Tensor,
    positions: torch.Tensor,
    state_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store each token's `kv` and `score + ape` for the token that will complete its group.

    Args:
        kv, score: float32 (tokens, w).
        ape: float32 (ratio, w).
        positions: int64 (tokens,).
        state_cache: float32 (blocks, block_size, 2 * w), changed in place.
        slot_mapping: int64 (tokens,), -1 is skipped.
    """
    keep = slot_mapping >= 0
    slots = slot_mapping[keep]
    tokens = slot_mapping.shape[0]
    biased = score[:tokens][keep] + ape[positions[:tokens][keep] % ape.shape[0]]
    block_size = state_cache.shape[1]
    rows = torch.cat((kv[:tokens][keep], biased), dim=1)
    state_cache[slots // block_size, slots % block_size] = rows


def _pool(
    state_cache: torch.Tensor,
    gather_slots: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    ratio: int,
) -> torch.Tensor:
    """Softmax pooling over the window, then RMS norm.

    Args:
        gather_slots: int64 (n, window); -1 for none; window is ratio, or twice that with overlap.
        norm_weight: float32 (head_dim,).
    Returns:
        float32 (n, head_dim).
    """
    head_dim = norm_weight.shape[0]
    block_size = state_cache.shape[1]
    slots = gather_slots.clamp(min=0)
    rows = state_cache[slots // block_size, slots % block_size]  # (n, window, 2 * w)
    kv, score = rows.chunk(2, dim=-1)
    if gather_slots.shape[1] > ratio:
        own_group = torch.arange(gather_slots.shape[1]).view(1, -1, 1) >= ratio
        kv = torch.where(own_group, kv[..., head_dim : 2 * head_dim], kv[..., :head_dim])
        score = torch.where(own_group, score[..., head_dim : 2 * head_dim], score[..., :head_dim])
    else:
        kv, score = kv[..., :head_dim], score[..., :head_dim]
    score = score.masked_fill((gather_slots < 0).unsqueeze(-1), float("-inf"))
    # A state row that was never written may hold NaN; its weight is 0, so its kv must be 0 too.
    kv = kv.masked_fill((gather_slots < 0).unsqueeze(-1), 0.0)
    pooled = (torch.softmax(score, dim=1) * kv).sum(dim=1)
    return pooled * torch.rsqrt(pooled.square().mean(-1, keepdim=True) + eps) * norm_weight


def _completed(positions: torch.Tensor, kv_slot_mapping: torch.Tensor, ratio: int) -> torch.Tensor:
    """Indices of the tokens that complete a group and have a slot for its key."""
    tokens = min(positions.shape[0], kv_slot_mapping.shape[0])
    done = ((positions[:tokens] + 1) % ratio == 0) & (kv_slot_mapping[:tokens] >= 0)
    return done.nonzero().squeeze(1)


def _rotated(
    pooled: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, ratio: int
) -> torch.Tensor:
    """Rotate the last 64 dimensions as the group's first position: bfloat16 (n, head_dim)."""
    nope, rope = pooled[:, :-ROPE_DIM], pooled[:, -ROPE_DIM:]
    first = positions // ratio * ratio
    return torch.cat((nope, rotate(rope, cos_sin_cache[first])), dim=1).bfloat16()


def compress_norm_rope_store_cpu(
    state_cache: torch.Tensor,
    gather_slots: torch.Tensor,
    positions: torch.Tensor,
    kv_slot_mapping: torch.Tensor,
    rms_norm_weight: torch.Tensor,
    rms_norm_eps: float,
    cos_sin_cache: torch.Tensor,
    kv_cache_2d: torch.Tensor,
    kv_cache_block_size: int,
    compress_ratio: int,
) -> None:
    """Write the key of every group that a token completes into an `fp8_ds_mla` cache.

    Args:
        state_cache: float32 (blocks, block_size, 2 * w).
        gather_slots: int64 (tokens, window) into the state cache, -1 for none.
        positions: int64 (tokens,).
        kv_slot_mapping: int64 (tokens,), slot of the compressed key, -1 for none.
        rms_norm_weight: float32 (512,).
        cos_sin_cache: float32 (positions, 64); the key is rotated as its group's first position.
        kv_cache_2d: uint8 (blocks, bytes), changed in place.
    """
    done = _completed(positions, kv_slot_mapping, compress_ratio)
    if not done.numel():
        return
    pooled = _pool(state_cache, gather_slots[done], rms_norm_weight, rms_norm_eps, compress_ratio)
    key = _rotated(pooled, positions[done], cos_sin_cache, compress_ratio)
    write_ds_mla(kv_cache_2d, kv_cache_block_size, kv_slot_mapping[done], key)


def compress_norm_rope_store_indexer_cpu(
    state_cache: torch.Tensor,
    gather_slots: torch.Tensor,
    positions: torch.Tensor,
    kv_slot_mapping: torch.Tensor,
    rms_norm_weight: torch.Tensor,
    rms_norm_eps: float,
    cos_sin_cache: torch.Tensor,
    kv_cache_2d: torch.Tensor,
    kv_cache_block_size: int,
    compress_ratio: int,
) -> None:
    """The same for the indexer's keys of 128: FP8 with one float32 power-of-two scale each.

    Cache, bytes of one block of B keys: [B x 128 FP8 e4m3] [B x 4, float32 scale].
    """
    done = _completed(positions, kv_slot_mapping, compress_ratio)
    if not done.numel():
        return
    pooled = _pool(state_cache, gather_slots[done], rms_norm_weight, rms_norm_eps, compress_ratio)
    key = _rotated(pooled, positions[done], cos_sin_cache, compress_ratio).float()
    scale = ue8m0_scale(key.abs().amax(-1, keepdim=True).clamp(min=MIN_SCALE), FP8_MAX)
    codes = (key / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    data, scales = index_regions(kv_cache_2d, kv_cache_block_size)
    slots = kv_slot_mapping[done]
    block, offset = slots // kv_cache_block_size, slots % kv_cache_block_size
    data[block, offset] = codes.view(torch.uint8)
    scales[block, offset] = scale.view(torch.uint8)


def index_regions(cache_2d: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of an indexer cache: codes (blocks, B, 128) and scale bytes (blocks, B, 4)."""
    data_bytes = block_size * INDEX_DIM
    data = cache_2d[:, :data_bytes].unflatten(1, (block_size, INDEX_DIM))
    scales = cache_2d[:, data_bytes : data_bytes + block_size * 4].unflatten(1, (block_size, 4))
    return data, scales
