#!/usr/bin/env python3
"""Write a W4A16 + FP8 DeepSeek-V4-Flash checkpoint of real layer sizes, few layers, random weights.

    python scripts/make_full_size.py --out DIR --layers 4 [--device cuda]

Every layer has all 256 experts and the published names, types and shapes, so an engine runs the
kernels of the real model on it. Weights are drawn so that activations keep a size near 1. They
also answer: the output head is the embedding moved by one row, so the model says t, t + 1, t + 2,
and so does an intact MTP head, whose drafts are therefore accepted. Tensors are made one layer at a
time; a layer with all experts is 3.4 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernels.formats import quantize_fp8_block  # noqa: E402
from serve.shapes import TensorSpec, checkpoint_tensors, flash_config  # noqa: E402

INDEX = "model.safetensors.index.json"
# Standard deviation of the codes -7..7, equally likely but for 0, which is drawn twice as often.
CODE_STD = math.sqrt(2 * sum(code**2 for code in range(8)) / 16)
NIBBLE_LOW_BITS = 0x11111111
LOGIT_OF_NEXT = 20.0  # of the next token, if the layers added nothing
H_PROJ_GAIN = 0.5  # the previous hidden state is the smaller part of the draft's input
FP8_COMPRESSOR_TARGETS = (
    r"re:.*attn\.compressor\.(wgate|wkv|fused_wkv_wgate|gate_proj|kv_proj)$",
    r"re:.*attn\.indexer\.(weights_proj|wq_b|q_b_proj)$",
    r"re:.*attn\.indexer\.compressor\.(wgate|wkv|gate_proj|kv_proj)$",
)


@dataclass(frozen=True)
class FullSizeConfig:
    """What is written, and on which device it is drawn."""

    layers: int
    seed: int = 0
    mtp: bool = True
    fp8_compressor: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers = {self.layers}; must be at least 1")


def model_config(config: FullSizeConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json: Flash's with the first layers and one MTP layer, or a smaller `base` so cut.

    Raises:
        ValueError: more layers than the base has.
    """
    base = json.loads(json.dumps(base or flash_config()))
    if config.layers > base["num_hidden_layers"]:
        raise ValueError(f"layers = {config.layers}; the model has {base['num_hidden_layers']}")
    base["compress_ratios"] = base["compress_ratios"][: config.layers] + [0]
    base["num_hidden_layers"] = config.layers
    # At least one layer keeps a learned router.
    base["num_hash_layers"] = min(base["num_hash_layers"], config.layers - 1)
    if config.fp8_compressor:
        base["quantization_config"]["config_groups"]["attention"]["targets"] += (
            FP8_COMPRESSOR_TARGETS
        )
    return base


class Draw:
    """Random tensors whose values depend on the seed, the device and their own name only."""

    def __init__(self, seed: int, device: str) -> None:
        self.seed, self.device = seed, device

    def generator(self, name: str) -> torch.Generator:
        # The CPU's generator takes 32 bits of the seed.
        seed = zlib.crc32(f"{self.seed}:{name}".encode())
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
        generator = self.generator(name)
        return torch.randn(shape, generator=generator, device=self.device) * std

    def words(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """int32 words of eight random codes + 8, whose mean is 0.

        Of the 16 codes -8 becomes 0: a mean of -0.5 adds the same sum of its inputs to all outputs
        of a product, which at real sizes outgrows the rest, and every token gets one answer.
        """
        generator, device = self.generator(name), self.device
        words = torch.randint(
            -(2**31), 2**31, shape, generator=generator, device=device, dtype=torch.int64
        ).to(torch.int32)
        lowest = ~(words | words >> 1 | words >> 2 | words >> 3) & NIBBLE_LOW_BITS
        return words | lowest << 3


def module_tensors(module: str, specs: list[TensorSpec], draw: Draw) -> dict[str, torch.Tensor]:
    """Tensors of one module, keyed by full name.

    Args:
        module: name without the leaf, e.g. `layers.0.attn.wq_a`.
        specs: its tensors.
    """
    by_leaf = {spec.name.removeprefix(f"{module}."): spec for spec in specs}
    if "weight_packed" in by_leaf:
        out_features, words = by_leaf["weight_packed"].shape
        scale = torch.full(by_leaf["weight_scale"].shape, (8 * words) ** -0.5 / CODE_STD)
        tensors = {
            "weight_packed": draw.words(module, (out_features, words)),
            "weight_scale": scale.to(torch.bfloat16),
            "weight_shape": torch.tensor([out_features, 8 * words]),
        }
    elif "weight_scale" in by_leaf:
        shape = by_leaf["weight"].shape
        data, scale = quantize_fp8_block(
            draw.normal(module, shape, shape[-1] ** -0.5), torch.float32
        )
        tensors = {"weight": data, "weight_scale": scale}
    else:
        tensors = {leaf: plain_tensor(spec, draw) for leaf, spec in by_leaf.items()}
    return {f"{module}.{leaf}" if module else leaf: value for leaf, value in tensors.items()}


def plain_tensor(spec: TensorSpec, draw: Draw) -> torch.Tensor:
    """A tensor that is not quantized."""
    name, shape = spec.name, spec.shape
    leaf = name.rpartition(".")[2]
    dtype = torch.float32 if spec.dtype == "F32" else torch.bfloat16
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype)
    if name == "embed.weight":
        return draw.normal(name, shape, 1.0).to(dtype)
    if name == "head.weight":  # row t + 1 answers to token t
        embed = draw.normal("embed.weight", shape, 1.0)
        return (embed.roll(1, dims=0) * (LOGIT_OF_NEXT / shape[1])).to(dtype)
    if name.endswith("e_proj.weight"):
        return torch.eye(shape[0], dtype=dtype)
    if name.endswith("h_proj.weight"):
        return draw.normal(name, shape, H_PROJ_GAIN * shape[1] ** -0.5).to(dtype)
    if leaf == "tid2eid":
        raise ValueError(f"{name}: made by hash_table")
    if leaf.endswith("_scale"):
        return torch.ones(shape)
    if leaf.endswith("_fn"):
        return draw.normal(name, shape, 0.5 * shape[1] ** -0.5)
    if leaf == "ape":
        return draw.normal(name, shape, 0.1)
    if leaf in ("attn_sink", "bias") or leaf.endswith("_base"):
        return torch.zeros(shape)
    return draw.normal(name, shape, shape[-1] ** -0.5).to(dtype)


def hash_table(spec: TensorSpec, num_experts: int) -> torch.Tensor:
    """Experts of each token: distinct, spread evenly."""
    tokens, top_k = spec.shape
    first = torch.arange(tokens)[:, None] * 7
    return (first + torch.arange(top_k) * (num_experts // top_k)) % num_experts  # (tokens, top_k)


def shards(
    config: Mapping[str, Any], specs: Iterable[TensorSpec], draw: Draw
) -> Iterator[dict[str, torch.Tensor]]:
    """The checkpoint's tensors, one file's worth at a time: each layer is one."""

    def shard_of(spec: TensorSpec) -> str:
        parts = spec.name.split(".")
        return ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else "top"

    for _, layer in groupby(specs, key=shard_of):
        tensors: dict[str, torch.Tensor] = {}
        for module, group in groupby(layer, key=lambda spec: spec.name.rpartition(".")[0]):
            members = list(group)
            for spec in [spec for spec in members if spec.name.endswith(".tid2eid")]:
                tensors[spec.name] = hash_table(spec, config["n_routed_experts"])
                members.remove(spec)
            if members:
                tensors |= module_tensors(module, members, draw)
        yield {name: value.cpu().contiguous() for name, value in tensors.items()}


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], parts: Iterable[Mapping[str, torch.Tensor]]
) -> None:
    """Write config.json, the shards under temporary names that are then replaced, and the index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, tensors in enumerate(parts, start=1):
        name = f"model-{number:05d}.safetensors"
        temporary = folder / f".{name}.part"
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        temporary.replace(folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        total_bytes += sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    for name, body in ((INDEX, index), ("config.json", config)):
        temporary = folder / f".{name}.part"
        temporary.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / name)


def make(folder: Path, config: FullSizeConfig, base: Mapping[str, Any] | None = None) -> None:
    """model_config -> specs -> draw -> write."""
    model = model_config(config, base)
    specs = checkpoint_tensors(model, mtp=config.mtp, fp8_compressor=config.fp8_compressor)
    write_checkpoint(folder, model, shards(model, specs, Draw(config.seed, config.device)))


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make_full_size", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder, made if absent")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    parser.add_argument("--no-mtp", action="store_true", help="without the head")
    parser.add_argument("--fp8-compressor", action="store_true", help="as first published")
    args = parser.parse_args(argv)
    try:
        config = FullSizeConfig(
            layers=args.layers,
            seed=args.seed,
            mtp=not args.no_mtp,
            fp8_compressor=args.fp8_compressor,
            device=args.device,
        )
        make(args.out, config)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.out}: {config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
