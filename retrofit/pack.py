"""Tensors of the W4A16-FP8 layout, by leaf name, from original ones."""

from __future__ import annotations

import torch

from kernels.formats import dequantize_fp4, dequantize_fp8_block, pack_int4
from kernels.weights import Kind, Layout, Weight, tensors
from retrofit import gptq
from retrofit.errors import BadInput
from retrofit.experts import Scale
from retrofit.reading import Checkpoint


def expert_tensors(stem: str, codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """INT4 codes int8 (out, in) and scale bf16 (out, groups) as compressed-tensors stores them."""
    return {
        f"{stem}.weight_packed": pack_int4(codes),
        f"{stem}.weight_scale": scale.to(torch.bfloat16),
        f"{stem}.weight_shape": torch.tensor(list(codes.shape), dtype=torch.int64),
    }


def attention_tensors(
    stem: str, weight: torch.Tensor, scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    """FP8 bytes as they are; the scale's powers of two as float32, under its new name.

    Never as uint8: an engine would read the exponents' bytes as the numbers 119, 127, 130.
    """
    return {f"{stem}.weight": weight, f"{stem}.weight_scale": scale.float()}


def stored(source: Checkpoint, weight: Weight) -> list[torch.Tensor]:
    """The original's tensors of a weight.

    Raises:
        BadInput: a value is NaN or infinite.
    """
    found = []
    for spec in tensors(weight, Layout.ORIGINAL):
        tensor = source.tensor(spec.name)
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise BadInput(f"{source.folder}: {spec.name} holds NaN or infinity")
        found.append(tensor)
    return found


def expert_values(source: Checkpoint, weight: Weight) -> torch.Tensor:
    """float32 values of an original FP4 expert, (out, in)."""
    return dequantize_fp4(*stored(source, weight))


def convert(source: Checkpoint, weight: Weight, scale: Scale) -> dict[str, torch.Tensor]:
    """One original weight in the W4A16-FP8 layout; experts are rounded to nearest."""
    if weight.kind == Kind.EXPERT:
        values = expert_values(source, weight)
        chosen = gptq.absmax_scale(values) if scale == Scale.ABSMAX else gptq.mse_scale(values)
        return expert_tensors(weight.stem, gptq.round_to_nearest(values, chosen), chosen)
    found = stored(source, weight)
    if weight.kind == Kind.ATTENTION:
        return attention_tensors(weight.stem, *found)
    if weight.kind == Kind.PROJECTION:
        return {weight.name: dequantize_fp8_block(*found, dtype=torch.bfloat16)}
    return {weight.name: found[0]}
