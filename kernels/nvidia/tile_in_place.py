"""Experts' weights laid out for our kernels where they lie: no second copy of a layer.

A layer of DeepSeek-V4-Flash holds 1.5 GiB of experts on each of two ranks, in memory that is full
when it is loaded. The tiled layout has as many bytes per expert as the stored one, so experts are
converted a few at a time and written back to where they came from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.tiled import TILE_K, tile_scale, tile_weight
from kernels.weights import CODES_PER_WORD

# Of a tensor, converted at a time; the temporaries are a few times this.
CHUNK_BYTES = 16 << 20


def tile_weight_in_place(weight_packed: torch.Tensor, gated: bool) -> torch.Tensor:
    """`kernels.tiled.tile_weight`, in the memory of its argument.

    Args:
        weight_packed: int32 (experts, n, k / 8), contiguous; its bytes are replaced.
        gated: as for `tile_weight`.
    Returns:
        int32 (experts, k / 16, 2 n) on the same memory.
    Raises:
        ValueError: not contiguous, or what `tile_weight` refuses; nothing was written.
    """
    _check("tile_weight_in_place", weight_packed)
    experts, size_n, words = weight_packed.shape
    shape = (experts, words * CODES_PER_WORD // TILE_K, 2 * size_n)
    return _replace(weight_packed, shape, lambda rows: tile_weight(rows, gated))


def tile_scale_in_place(weight_scale: torch.Tensor, gated: bool) -> torch.Tensor:
    """`kernels.tiled.tile_scale`, in the memory of its argument.

    Args:
        weight_scale: BF16 (experts, n, k / 128), contiguous; its bytes are replaced.
    Returns:
        BF16 (experts, k / 128, n) on the same memory.
    Raises:
        ValueError: not contiguous, or what `tile_scale` refuses; nothing was written.
    """
    _check("tile_scale_in_place", weight_scale)
    experts, size_n, groups = weight_scale.shape
    return _replace(weight_scale, (experts, groups, size_n), lambda rows: tile_scale(rows, gated))


def _check(operation: str, tensor: torch.Tensor) -> None:
    if tensor.dim() != 3 or not tensor.is_contiguous():
        raise ValueError(
            f"{operation}: shape = {tuple(tensor.shape)}, stride = {tensor.stride()}; a contiguous "
            "(experts, n, ..) is needed"
        )


def _replace(
    stored: torch.Tensor, shape: tuple[int, int, int], tile: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Experts b .. e - 1 lie in the same bytes before and after, so none is written too early."""
    tiled = stored.view(-1).view(shape)
    expert_bytes = stored[0].numel() * stored.element_size()
    step = max(1, CHUNK_BYTES // max(expert_bytes, 1))
    for begin in range(0, len(stored), step):
        tiled[begin : begin + step] = tile(stored[begin : begin + step])
    return tiled
