"""Tensors of the W4A16-FP8 layout, by leaf name, from original ones."""

from __future__ import annotations

import torch

from kernels.formats import dequantize_fp4, dequantize_fp8_block, pack_int4
from retrofit import gptq
from retrofit.errors import BadInput
from retrofit.experts import Scale
from retrofit.layout import Kind, Layout, Weight, tensors
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


# Regular expressions that also match layer `num_hidden_layers`, where the head is built. Each
# group states its own format: the global "mixed-precision" is no format that a layer can have.
QUANTIZATION_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "quantization_status": "compressed",
    "config_groups": {
        "attention": {
            "format": "float-quantized",
            "targets": [
                r"re:.*attn\.(wq_a|wq_b|wkv|wo_a|wo_b|fused_wqa_wkv)$",
                r"re:.*attn\.indexer\.wq_b$",
            ],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "block",
                "block_structure": [128, 128],
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "group",
                "group_size": 128,
                "symmetric": True,
                "dynamic": True,
            },
        },
        "experts": {
            "format": "pack-quantized",
            "targets": [r"re:.*experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj|gate_up_proj)$"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 128,
                "symmetric": True,
                "dynamic": False,
            },
        },
    },
    "ignore": ["lm_head"],
}
