"""Write a checkpoint: the original FP4/FP8 layout, or W4A16 in compressed-tensors.

Original layout (`Layout.ORIGINAL`): names, dtypes and scales of `deepseek-ai/DeepSeek-V4-Flash`.
W4A16 (`Layout.W4A16`): routed experts INT4 in groups of 128, attention FP8 with float32 scales,
everything else bfloat16 or float32, as the community's W4A16-FP8 checkpoints with an MTP layer
in the matching form.

A checkpoint is written into a temporary folder beside its place and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from enum import StrEnum
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kernels.formats import quantize_fp4, quantize_fp8_block, quantize_int4
from kernels.weights import EXPERT_DTYPE, QUANTIZATION_CONFIG
from tiny.config import TinyConfig
from tiny.layers import Storage
from tiny.model import DeepseekV4
from tiny.names import slots
from tiny.quant import fake_fp4, fake_fp8_block
from tiny.tokenizer import FILES as TOKENIZER_FILES

NUM_SHARDS = 2
INDEX = "model.safetensors.index.json"
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
        folder: replaced when it exists.
        layout: see the module.
        tokenizer: folder to copy tokenizer files from, if any.
    """
    settings = model.config.to_dict()
    original = layout == Layout.ORIGINAL
    settings["quantization_config"] = ORIGINAL_QUANTIZATION if original else QUANTIZATION_CONFIG
    if not original:
        settings["expert_dtype"] = EXPERT_DTYPE
    temporary = folder.with_name(folder.name + ".tmp")
    remove_folder(temporary)
    temporary.mkdir(parents=True)
    write_shards(tensors_of(model, layout), temporary)
    (temporary / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if tokenizer is not None:
        copy_tokenizer(tokenizer, temporary)
    replace_folder(temporary, folder)


def write_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Split tensors, in order, into NUM_SHARDS files of about equal size and write the index."""
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    total = sum(sizes.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(NUM_SHARDS)]
    weight_map, done = {}, 0
    for name, tensor in tensors.items():
        number = min(done * NUM_SHARDS // total, NUM_SHARDS - 1)
        shards[number][name] = tensor
        weight_map[name] = f"model-{number + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        done += sizes[name]
    for number, shard in enumerate(shards):
        path = folder / f"model-{number + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        _save(shard, path)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600, which a container's other user cannot read


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's three files.

    Raises:
        FileNotFoundError: one is not in `source`.
    """
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            raise FileNotFoundError(f"export: tokenizer file {source / name} does not exist")
        shutil.copyfile(source / name, folder / name)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put `temporary` in the place of `folder`; files that only the old one has are dropped."""
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)


def remove_folder(folder: Path) -> None:
    """Delete a folder and what is in it, if it exists."""
    if folder.exists():
        shutil.rmtree(folder)


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file name.

    Raises:
        FileNotFoundError: folder or index missing.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist")
    return json.loads(path.read_text())["weight_map"]


def checkpoint_sha256(folder: Path) -> str:
    """One digest over the bytes of config.json and all shards, in name order."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def shuffle_mtp_experts(src: Path, dst: Path, seed: int = 0) -> None:
    """Copy a checkpoint with its MTP experts mixed up: the negative control of acceptance.

    In every projection (w1, w2, w3) on its own, each expert gets the tensors of another expert.
    Names, shapes and dtypes stay valid, so that any loader takes the copy; the routed output of
    the MTP layer becomes noise. Works on both layouts; `dst` is replaced when it exists.

    Raises:
        ValueError: the checkpoint has no MTP experts.
    """
    names = [n for n in read_index(src) if re.match(r"mtp\.0\.ffn\.experts\.\d+\.", n)]
    if not names:
        raise ValueError(f"shuffle_mtp_experts: {src} has no tensor mtp.0.ffn.experts.*")
    experts = 1 + max(int(n.split(".")[4]) for n in names)
    generator = torch.Generator().manual_seed(seed)
    order = {p: _derangement(experts, generator) for p in PROJECTIONS}
    temporary = dst.with_name(dst.name + ".tmp")
    remove_folder(temporary)
    shutil.copytree(src, temporary)
    everything: dict[str, torch.Tensor] = {}
    shards = sorted(set(read_index(src).values()))
    for shard in shards:
        everything.update(load_file(src / shard))
    for shard in shards:
        here = [n for n, s in read_index(src).items() if s == shard]
        tensors = {n: everything[_shuffled_name(n, order)] for n in here}
        _save(tensors, temporary / shard)
    replace_folder(temporary, dst)


def repeat_index_heads(src: Path, dst: Path, times: int) -> None:
    """Copy a checkpoint with every indexer head there `times` times: the same model, wider.

    Scores of all keys grow by the same factor, so the same ones are selected. vLLM's fused kernel
    on NVIDIA wants a multiple of 8 heads. Works on both layouts; `dst` is replaced when it exists.
    """
    temporary = dst.with_name(dst.name + ".tmp")
    remove_folder(temporary)
    shutil.copytree(src, temporary)
    total = 0
    for shard in sorted(set(read_index(src).values())):
        tensors = load_file(src / shard)
        for name, tensor in tensors.items():
            if re.search(r"\.indexer\.(wq_b|weights_proj)\.", name):  # a head is an FP8 block
                tensors[name] = torch.cat([tensor] * times)
        total += sum(tensor.nbytes for tensor in tensors.values())
        _save(tensors, temporary / shard)
    index = json.loads((src / INDEX).read_text())
    index["metadata"]["total_size"] = total
    (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    settings = json.loads((src / "config.json").read_text())
    settings["index_n_heads"] *= times
    (temporary / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    replace_folder(temporary, dst)


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
