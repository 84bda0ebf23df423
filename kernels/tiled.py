"""Weights in the tiled layout of `csrc/w4a16.h`, from compressed-tensors pack-quantized and back.

The layout is the one that Marlin reads, so one copy serves our kernels and vLLM's Marlin:

    stored   weight_packed int32 (experts, n, k / 8)     weight_scale BF16 (experts, n, k / 128)
    tiled    weight        int32 (experts, k / 16, 2 n)  scale        BF16 (experts, k / 128, n)

Experts are any leading dimensions, also none. A tile is 16 k x 64 rows in 128 words; word 4 l + w
belongs to lane l = 4 g + t, row tile w. What moves, with u, h, v in 0, 1:

    stored word (row 64 b + 16 w + 8 h + g, word 2 k16 + u), nibble 2 t + v
    tiled word  (k16, 128 b + 16 g + 4 t + w),               nibble u + 2 h + 4 v

`gated` is for w13: its rows, stored as all gate rows then all up rows, lie interleaved by 32.

One difference from Marlin: with a single group (k = 128) it reads the scales in another order
(as one per channel). Our kernels read the order above for every k.
"""

from __future__ import annotations

import torch

from kernels.weights import CODES_PER_WORD, INT4_GROUP

BLOCK_ROWS = 64  # rows of a tile
TILE_K = 16
INTERLEAVE = 32  # gate rows, then up rows, of a block

# Words permuted at a time: temporaries are a few times this, whatever the layer holds.
_CHUNK_WORDS = 8 << 20


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def tile_weight(weight_packed: torch.Tensor, gated: bool = False) -> torch.Tensor:
    """Permute pack-quantized codes into tiles.

    Args:
        weight_packed: int32 (*experts, n, k / 8), any strides; code i of a word is q + 8 in bits
            4 i .. 4 i + 3; n a multiple of 64, k of 128.
        gated: the rows are n / 2 gate rows, then n / 2 up rows: interleave them.
    Returns:
        int32 (*experts, k / 16, 2 n), contiguous, on the same device.
    Raises:
        ValueError: another dtype, fewer than two dimensions, n or k not such a multiple.
    Source: `csrc/w4a16.h`; equal to vLLM's `gptq_marlin_repack` of the interleaved rows.
    """
    operation = "tile_weight"
    *experts, size_n, words = _stored_shape(operation, weight_packed, torch.int32)
    size_k = words * CODES_PER_WORD
    _check_sizes(operation, size_n, size_k)
    stored = _flatten_experts(weight_packed)
    tiled = stored.new_empty(len(stored), size_k // TILE_K, 2 * size_n)
    step = max(1, _CHUNK_WORDS // (size_n * words))
    for begin in range(0, len(stored), step):
        rows = stored[begin : begin + step]
        if gated:
            rows = interleave_rows(rows)
        tiled[begin : begin + step] = _tile(rows)
    return tiled.reshape(*experts, size_k // TILE_K, 2 * size_n)


def untile_weight(tiled: torch.Tensor, gated: bool = False) -> torch.Tensor:
    """Inverse of `tile_weight`: int32 (*experts, k / 16, 2 n) -> (*experts, n, k / 8).

    Raises:
        ValueError: another dtype, fewer than two dimensions, n no multiple of 64 or k of 128.
    """
    operation = "untile_weight"
    *experts, tiles, words = _stored_shape(operation, tiled, torch.int32)
    _need(words % 2 == 0, f"{operation}: a row has {words} words; 2 n are needed")
    size_n, size_k = words // 2, tiles * TILE_K
    _check_sizes(operation, size_n, size_k)
    flat = _flatten_experts(tiled)
    stored = flat.new_empty(len(flat), size_n, size_k // CODES_PER_WORD)
    step = max(1, _CHUNK_WORDS // (tiles * words))
    for begin in range(0, len(flat), step):
        rows = _untile(flat[begin : begin + step])
        stored[begin : begin + step] = deinterleave_rows(rows) if gated else rows
    return stored.reshape(*experts, size_n, size_k // CODES_PER_WORD)


def tile_scale(weight_scale: torch.Tensor, gated: bool = False) -> torch.Tensor:
    """Permute scales for the tiles: position 8 i + j of a block of 64 rows holds row i + 8 j.

    Args:
        weight_scale: BF16 (*experts, n, k / 128), any strides; n a multiple of 64.
        gated: as in `tile_weight`.
    Returns:
        BF16 (*experts, k / 128, n), contiguous.
    Raises:
        ValueError: another dtype, fewer than two dimensions, n no multiple of 64.
    Source: `csrc/w4a16.h`; equal to vLLM's `marlin_permute_scales` for k > 128.
    """
    *experts, size_n, groups = _stored_shape("tile_scale", weight_scale, torch.bfloat16)
    _check_sizes("tile_scale", size_n, groups * INT4_GROUP)
    rows = _flatten_experts(weight_scale)
    if gated:
        rows = interleave_rows(rows)
    blocks = rows.transpose(1, 2).reshape(len(rows), groups, size_n // BLOCK_ROWS, 8, 8)
    return blocks.transpose(3, 4).reshape(*experts, groups, size_n)


def untile_scale(scale: torch.Tensor, gated: bool = False) -> torch.Tensor:
    """Inverse of `tile_scale`: BF16 (*experts, k / 128, n) -> (*experts, n, k / 128).

    Raises:
        ValueError: another dtype, fewer than two dimensions, n no multiple of 64.
    """
    *experts, groups, size_n = _stored_shape("untile_scale", scale, torch.bfloat16)
    _check_sizes("untile_scale", size_n, groups * INT4_GROUP)
    blocks = _flatten_experts(scale).reshape(-1, groups, size_n // BLOCK_ROWS, 8, 8)
    rows = blocks.transpose(3, 4).reshape(-1, groups, size_n).transpose(1, 2)  # (e, n, groups)
    if gated:
        rows = deinterleave_rows(rows)
    return rows.reshape(*experts, size_n, groups).contiguous()


def interleave_rows(rows: torch.Tensor) -> torch.Tensor:
    """Gate rows then up rows -> by turns 32 gate rows and the 32 up rows of the same features.

    Args:
        rows: any dtype, (*experts, 2 * inter, columns); inter a multiple of 32.
    Returns:
        The same shape: block b of 64 rows is gate rows 32 b .. 32 b + 31, then such up rows.
    Raises:
        ValueError: fewer than two dimensions, or inter no multiple of 32.
    """
    size_n = _interleavable("interleave_rows", rows)
    split = rows.unflatten(-2, (2, size_n // (2 * INTERLEAVE), INTERLEAVE))
    return split.transpose(-4, -3).reshape(rows.shape)


def deinterleave_rows(rows: torch.Tensor) -> torch.Tensor:
    """Inverse of `interleave_rows`.

    Raises:
        ValueError: fewer than two dimensions, or inter no multiple of 32.
    """
    size_n = _interleavable("deinterleave_rows", rows)
    split = rows.unflatten(-2, (size_n // (2 * INTERLEAVE), 2, INTERLEAVE))
    return split.transpose(-4, -3).reshape(rows.shape)


def _interleavable(operation: str, rows: torch.Tensor) -> int:
    _need(
        rows.dim() >= 2 and rows.shape[-2] % (2 * INTERLEAVE) == 0,
        f"{operation}: shape = {tuple(rows.shape)}; (.., 2 * inter, columns) is needed, inter a "
        f"multiple of {INTERLEAVE}",
    )
    return rows.shape[-2]


def _stored_shape(operation: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Size:
    _need(
        tensor.dtype == dtype and tensor.dim() >= 2,
        f"{operation}: dtype = {tensor.dtype}, shape = {tuple(tensor.shape)}; {dtype} with at "
        "least two dimensions is needed",
    )
    return tensor.shape


def _check_sizes(operation: str, size_n: int, size_k: int) -> None:
    _need(
        size_n > 0 and size_n % BLOCK_ROWS == 0,
        f"{operation}: size_n = {size_n} is not a multiple of {BLOCK_ROWS}",
    )
    _need(
        size_k > 0 and size_k % INT4_GROUP == 0,
        f"{operation}: size_k = {size_k} is not a multiple of {INT4_GROUP}",
    )


def _flatten_experts(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, *tensor.shape[-2:])


def _tile(rows: torch.Tensor) -> torch.Tensor:
    """int32 (experts, n, k / 8) -> (experts, k / 16, 2 n)."""
    experts, size_n, words = rows.shape
    blocks = size_n // BLOCK_ROWS
    x = rows.reshape(experts, blocks, 4, 2, 8, words // 2, 2)  # (e, b, w, h, g, k16, u)
    lanes = []
    for t in range(4):
        byte = (x >> (8 * t)) & 0xFF
        pair = (byte & 0x0F) | ((byte & 0xF0) << 12)  # codes 2t, 2t + 1 in nibbles 0 and 4
        low = pair[..., 0] | (pair[..., 1] << 4)  # (e, b, w, h, g, k16)
        lanes.append(low[:, :, :, 0] | (low[:, :, :, 1] << 8))  # (e, b, w, g, k16)
    tiled = torch.stack(lanes, dim=-1)  # (e, b, w, g, k16, t)
    return tiled.permute(0, 4, 1, 3, 5, 2).reshape(experts, words // 2, 2 * size_n)


def _untile(tiled: torch.Tensor) -> torch.Tensor:
    """int32 (experts, k / 16, 2 n) -> (experts, n, k / 8)."""
    experts, tiles, words = tiled.shape
    size_n = words // 2
    x = tiled.reshape(experts, tiles, size_n // BLOCK_ROWS, 8, 4, 4)  # (e, k16, b, g, t, w)
    x = x.permute(0, 2, 5, 3, 1, 4)  # (e, b, w, g, k16, t)
    halves = []
    for h in range(2):
        parts = []
        for u in range(2):
            pair = x >> (4 * (u + 2 * h))
            byte = (pair & 0x0F) | ((pair >> 12) & 0xF0)
            low = byte[..., 0] | (byte[..., 1] << 8)
            parts.append(low | (byte[..., 2] << 16) | (byte[..., 3] << 24))  # (e, b, w, g, k16)
        halves.append(torch.stack(parts, dim=-1))  # (e, b, w, g, k16, u)
    stored = torch.stack(halves, dim=3)  # (e, b, w, h, g, k16, u)
    return stored.reshape(experts, size_n, 2 * tiles)
