"""Write a checkpoint: the original FP4/FP8 layout, or W4A16 in compressed-tensors.

Original layout (`Layout.ORIGINAL`): names, dtypes and scales of `deepseek-ai/DeepSeek-V4-Flash`.
W4A16 (`Layout.W4A16`): routed experts INT4 in groups of 128, attention FP8 with float32 scales,
everything else bfloat16 or float32, as the community's W4A16-FP8 checkpoints with an MTP layer
in the matching form.

A checkpoint is written into a fresh folder beside its place and then renamed (`tiny.folder`).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from enum import StrEnum
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from kernels.formats import quantize_fp4, quantize_fp8_block, quantize_int4
from kernels.weights import EXPERT_DTYPE, QUANTIZATION_CONFIG
from tiny.config import TinyConfig
from tiny.folder import CONFIG, INDEX, NUM_SHARDS, SHARDS, replacing
from tiny.layers import Storage
from tiny.model import DeepseekV4
from tiny.names import slots
from tiny.quant import fake_fp4, fake_fp8_block
from tiny.tokenizer import FILES as TOKENIZER_FILES

PROJECTIONS = ("w1", "w2", "w3")


class Layout(StrEnum):
    """Which of the two forms to write."""

    ORIGINAL = "original"
    W4A16 = "w4a16"


ORIGINAL_QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


def tensors_of(model: DeepseekV4, layout: Layout) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name, in writing order.

    W4A16 is quantized from the values that the original layout stores, not from the master
    weights: it is a re-quantization, as with the real model.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, slot in slots(model).items():
        weight = slot.tensor.detach().cpu()
        write = _original if layout == Layout.ORIGINAL else _w4a16
        tensors.update(write(name, weight, slot.storage))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _original(name: str, weight: torch.Tensor, storage: Storage | None) -> dict:
    stem = name.removesuffix(".weight")
    if storage is None:
        return {name: weight.to(torch.int64)}
    if storage == Storage.FP4:
        packed, scale = quantize_fp4(weight)
        return {name: packed, f"{stem}.scale": scale}
    if storage == Storage.FP8:
        data, scale = quantize_fp8_block(weight)
        return {name: data, f"{stem}.scale": scale}
    return {name: weight.to(torch.bfloat16 if storage == Storage.BF16 else torch.float32)}


def _w4a16(name: str, weight: torch.Tensor, storage: Storage | None) -> dict:
    stem = name.removesuffix(".weight")
    if storage == Storage.FP4:
        packed, scale, shape = quantize_int4(fake_fp4(weight))
        return {
            f"{stem}.weight_packed": packed,
            f"{stem}.weight_scale": scale,
            f"{stem}.weight_shape": shape,
        }
    if storage == Storage.FP8 and ".attn." in name:
        data, scale = quantize_fp8_block(weight)
        return {name: data, f"{stem}.weight_scale": scale.float()}
    if storage == Storage.FP8:  # shared experts, e_proj, h_proj
        return {name: fake_fp8_block(weight).to(torch.bfloat16)}
    return _original(name, weight, storage)


def export(
    model: DeepseekV4, folder: Path, layout: Layout = Layout.ORIGINAL, tokenizer: Path | None = None
) -> None:
    """Write `folder`: two shards, their index, config.json, and the tokenizer's files.

    Args:
        model: any device and floating dtype.
        folder: replaced when it exists and holds nothing else.
        layout: see the module.
        tokenizer: folder to copy tokenizer files from, if any.
    Raises:
        ValueError: `folder` cannot be replaced.
        FileNotFoundError: a tokenizer file is missing.
    """
    settings = model.config.to_dict()
    original = layout == Layout.ORIGINAL
    settings["quantization_config"] = ORIGINAL_QUANTIZATION if original else QUANTIZATION_CONFIG
    if not original:
        settings["expert_dtype"] = EXPERT_DTYPE
    with replacing(folder) as new:
        write_shards(tensors_of(model, layout), new)
        write_config(settings, new)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, new)


def write_config(settings: dict[str, object], folder: Path) -> None:
    """Write `config.json`."""
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def write_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Split tensors, in order, into NUM_SHARDS files of about equal size and write the index."""
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    total = sum(sizes.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(NUM_SHARDS)]
    weight_map, done = {}, 0
    for name, tensor in tensors.items():
        number = min(done * NUM_SHARDS // total, NUM_SHARDS - 1)
        shards[number][name] = tensor
        weight_map[name] = SHARDS[number]
        done += sizes[name]
    for file_name, shard in zip(SHARDS, shards, strict=True):
        # Not `save_file`: it hides what the system says, and only the owner can read its file.
        (folder / file_name).write_bytes(save(shard, metadata={"format": "pt"}))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's three files.

    Raises:
        FileNotFoundError: one is not in `source`.
    """
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            raise FileNotFoundError(f"export: tokenizer file {source / name} does not exist")
        shutil.copyfile(source / name, folder / name)


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file name.

    Raises:
        FileNotFoundError: folder or index missing.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist")
    return json.loads(path.read_text())["weight_map"]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all shards that the index names.

    Raises:
        FileNotFoundError: folder, index or a shard is missing.
        ValueError: a shard is damaged, or does not hold what the index says.
    """
    index = read_index(folder)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(index.values())):
        path = folder / shard
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint: shard {path} does not exist; the index names it")
        try:
            tensors.update(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"checkpoint: shard {path} is damaged: {error}") from error
    compare("index and shards", set(index), set(tensors))
    return tensors


def compare(what: str, expected: set[str], found: set[str]) -> None:
    """Refuse names that are missing or left over.

    Raises:
        ValueError: the sets differ.
    """
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        raise ValueError(
            f"checkpoint: {what} differ: {len(missing)} missing {missing[:3]}, "
            f"{len(extra)} unexpected {extra[:3]}"
        )


def checkpoint_sha256(folder: Path) -> str:
    """One digest over the bytes of config.json and all shards, in name order."""
    digest = hashlib.sha256()
    for path in sorted([folder / CONFIG, *folder.glob("*.safetensors")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def shuffle_mtp_experts(src: Path, dst: Path, seed: int = 0) -> None:
    """Copy a checkpoint with its MTP experts mixed up: the negative control of acceptance.

    In every projection (w1, w2, w3) on its own, each expert gets the tensors of another expert.
    Names, shapes and dtypes stay valid, so that any loader takes the copy; the routed output of
    the MTP layer becomes noise. Works on both layouts; `dst` is replaced when it exists.

    Raises:
        ValueError: the checkpoint has no MTP experts, or is damaged; `dst` cannot be replaced.
        FileNotFoundError: a file of the checkpoint is missing.
    """
    index = read_index(src)
    names = [n for n in index if re.match(r"mtp\.0\.ffn\.experts\.\d+\.", n)]
    if not names:
        raise ValueError(f"shuffle_mtp_experts: {src} has no tensor mtp.0.ffn.experts.*")
    experts = 1 + max(int(n.split(".")[4]) for n in names)
    generator = torch.Generator().manual_seed(seed)
    order = {p: _derangement(experts, generator) for p in PROJECTIONS}
    with replacing(dst) as new:
        tensors = read_tensors(src)
        write_shards({n: tensors[_shuffled_name(n, order)] for n in index}, new)
        write_config(json.loads((src / CONFIG).read_text()), new)
        _copy_tokenizer_if_any(src, new)


def repeat_index_heads(src: Path, dst: Path, times: int) -> None:
    """Copy a checkpoint with every indexer head there `times` times: the same model, wider.

    Scores of all keys grow by the same factor, so the same ones are selected. vLLM's fused kernel
    on NVIDIA wants a multiple of 8 heads. Works on both layouts; `dst` is replaced when it exists.

    Raises:
        ValueError: times < 1; the checkpoint is damaged; `dst` cannot be replaced.
        FileNotFoundError: a file of the checkpoint is missing.
    """
    if times < 1:
        raise ValueError(f"repeat_index_heads: times = {times}; it must be at least 1")
    with replacing(dst) as new:
        tensors = read_tensors(src)
        for name, tensor in tensors.items():
            if re.search(r"\.indexer\.(wq_b|weights_proj)\.", name):  # a head is an FP8 block
                tensors[name] = torch.cat([tensor] * times)
        write_shards({n: tensors[n] for n in read_index(src)}, new)
        settings = json.loads((src / CONFIG).read_text())
        settings["index_n_heads"] *= times
        write_config(settings, new)
        _copy_tokenizer_if_any(src, new)


def _copy_tokenizer_if_any(src: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, folder / name)


def _shuffled_name(name: str, order: dict[str, list[int]]) -> str:
    found = re.match(r"(mtp\.0\.ffn\.experts\.)(\d+)\.(w[123])\.(.*)", name)
    if not found:
        return name
    prefix, expert, projection, leaf = found.groups()
    return f"{prefix}{order[projection][int(expert)]}.{projection}.{leaf}"


def _derangement(n: int, generator: torch.Generator) -> list[int]:
    """A random permutation without a fixed point."""
    while True:
        order = torch.randperm(n, generator=generator).tolist()
        if all(i != j for i, j in enumerate(order)):
            return order


def describe(folder: Path) -> dict[str, object]:
    """Size, counts and digest of a checkpoint, for `info` and for provenance."""
    config = TinyConfig.load(folder)
    names = read_index(folder)
    files = [p for p in folder.iterdir() if p.is_file()]
    return {
        "layers": config.num_hidden_layers,
        "tensors": len(names),
        "mtp_tensors": sum(n.startswith("mtp.") for n in names),
        "bytes": sum(p.stat().st_size for p in files),
        "sha256": checkpoint_sha256(folder),
    }
