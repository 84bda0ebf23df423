"""Read an exported checkpoint, in either layout, into the plain PyTorch model."""

from __future__ import annotations

from pathlib import Path

import torch

from kernels.formats import dequantize_fp4, dequantize_fp8_block, dequantize_int4
from tiny.config import TinyConfig
from tiny.export import compare, read_tensors
from tiny.model import DeepseekV4
from tiny.names import slots


def dequantized(tensors: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, set[str]]:
    """Values of one weight and the names of the tensors that make it up.

    float32 for every quantized or floating weight (exact), int64 for `tid2eid`.

    Raises:
        ValueError: the weight or a part of it is absent.
    """
    stem = name.removesuffix(".weight")
    packed = f"{stem}.weight_packed"
    if packed in tensors:
        used = {packed, f"{stem}.weight_scale", f"{stem}.weight_shape"}
        compare(f"weight {name}", used, used & tensors.keys())
        parts = (tensors[f"{stem}.weight_{part}"] for part in ("packed", "scale", "shape"))
        return dequantize_int4(*parts), used
    if name not in tensors:
        raise ValueError(f"checkpoint: tensor {name} is missing")
    weight = tensors[name]
    if weight.dtype not in (torch.int8, torch.float8_e4m3fn):
        return weight if weight.dtype == torch.int64 else weight.float(), {name}
    scales = {f"{stem}.scale", f"{stem}.weight_scale"} & tensors.keys()
    if len(scales) != 1:
        raise ValueError(f"checkpoint: {name} is {weight.dtype} and has {len(scales)} scales")
    scale = tensors[next(iter(scales))]
    dequantize = dequantize_fp4 if weight.dtype == torch.int8 else dequantize_fp8_block
    return dequantize(weight, scale), {name} | scales


def load(folder: Path, device: str = "cpu", fp8_cache: bool = True) -> DeepseekV4:
    """Read a checkpoint for inference.

    Args:
        folder: as written by `tiny.export`.
        device: where to put the model.
        fp8_cache: simulate the engine's FP8 key-value and indexer caches.
    Returns:
        the model in eval mode; parameters float32, with exactly the stored values.
    Raises:
        FileNotFoundError: folder or files missing.
        ValueError: wrong model_type, damaged shard, missing or left-over tensor, wrong shape.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint: folder {folder} does not exist")
    model = DeepseekV4(TinyConfig.load(folder))
    tensors = read_tensors(folder)
    used: set[str] = set()
    for name, slot in slots(model).items():
        weight, parts = dequantized(tensors, name)
        if weight.shape != slot.tensor.shape:
            raise ValueError(
                f"checkpoint: {name} has shape {tuple(weight.shape)}; config.json makes it "
                f"{tuple(slot.tensor.shape)}"
            )
        slot.tensor.copy_(weight)
        used |= parts
    compare("model and checkpoint", used, set(tensors))
    model.set_quantization(weights=False, caches=fp8_cache)
    return model.to(device).eval().requires_grad_(False)
