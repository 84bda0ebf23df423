"""Good and broken checkpoints: the full-size generator at tiny sizes, with one thing changed each.

The letters A to U are those of the table of what unpatched vLLM 0.32.0 does.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kernels.formats import quantize_fp4, quantize_fp8_block
from scripts.make_full_size import (
    INDEX,
    Draw,
    FullSizeConfig,
    model_config,
    shards,
    write_checkpoint,
)
from serve.shapes import checkpoint_tensors, flash_config

# Named tensors in, named tensors out: [] drops, two add.
Edit = Callable[[str, torch.Tensor], list[tuple[str, torch.Tensor]]]
# The KV cache does not depend on these.
SMALL = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
    "num_attention_heads": 16,
    "q_lora_rank": 128,
    "o_lora_rank": 128,
}
TINY = SMALL | {
    "index_n_heads": 4,
    "num_hidden_layers": 3,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128, 0],
    # The rotary table is built for every layer: keep it small.
    "max_position_embeddings": 8192,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 512,
    },
}
NUM_LAYERS = TINY["num_hidden_layers"]
ATTENTION = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")
EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class Scenario:
    """One checkpoint. `parts`: which models are loaded from it."""

    parts: tuple[str, ...] = ("draft",)
    edit: Edit | None = None
    layout: dict[str, Any] = field(default_factory=dict)
    targets: str = "wide"  # or native, literal; deepseek is FP8 and FP4 as first published
    ignore: tuple[str, ...] = ()
    group_size: int | None = None  # of the INT4 experts, as the config says; None leaves 128
    unlisted: str | None = None  # text in the names that the index leaves out


def drop(text: str) -> Edit:
    return lambda name, tensor: [] if text in name else [(name, tensor)]


def rename(old: str, new: str) -> Edit:
    return lambda name, tensor: [(name.replace(old, new), tensor)]


def in_head(edit: Edit) -> Edit:
    """The edit, on the MTP head alone."""
    return lambda name, tensor: edit(name, tensor) if name.startswith("mtp.") else [(name, tensor)]


def names_of_transformers(kind: str) -> Edit:
    """w1, w2, w3 of `experts` or `shared_experts` as Transformers calls them."""

    def edit(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        parts = name.split(".")
        if kind in parts:
            parts = [EXPERT_NAMES.get(part, part) for part in parts]
        return [(".".join(parts), tensor)]

    return edit


def scale_leaf(leaf: str) -> Edit:
    """Scales of the attention under another name."""

    def edit(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        if ".attn." in name and name.endswith(".weight_scale"):
            name = name.removesuffix("weight_scale") + leaf
        return [(name, tensor)]

    return edit


def scale_type(dtype: torch.dtype) -> Edit:
    """Scales of the attention as E8M0, or its bytes under an integer type: all are 2**-7."""

    def edit(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        if ".attn." in name and name.endswith(".weight_scale"):
            tensor = torch.full_like(tensor, 2.0**-7).to(torch.float8_e8m0fnu).view(dtype)
        return [(name, tensor)]

    return edit


def bf16_attention(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The head's attention as a BF16 checkpoint stores it: no scale."""
    if tensor.dtype == torch.float8_e4m3fn:
        return [(name, tensor.float().bfloat16())]
    return [] if ".attn." in name and name.endswith(".weight_scale") else [(name, tensor)]


def bf16_head(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The whole head in BF16, its experts too."""
    if name.endswith((".weight_shape", ".weight_scale")):
        return []
    if name.endswith(".weight_packed"):
        out_features, words = tensor.shape
        weight = torch.randn(out_features, 8 * words).bfloat16()
        return [(name.replace("weight_packed", "weight"), weight)]
    return bf16_attention(name, tensor)


def original_head(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """FP4 experts with E8M0 scales called `scale`, as DeepSeek published the head."""
    if ".experts." in name:
        if not name.endswith(".weight_packed"):
            return []
        weight = Draw(0, "cpu").normal(name, (tensor.shape[0], 8 * tensor.shape[1]), 1.0)
        packed, scale = quantize_fp4(weight)
        stem = name.removesuffix("weight_packed")
        return [(f"{stem}weight", packed), (f"{stem}scale", scale)]
    return scale_leaf("scale")(name, tensor)


def published_by_deepseek(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Target and head as DeepSeek published them: FP4 experts, FP8 linears, E8M0 scales."""
    if ".experts." in name:
        return original_head(name, tensor)
    if name.endswith(".weight_scale"):
        return []
    linear = (".shared_experts.", "e_proj.", "h_proj.")
    if tensor.dtype == torch.float8_e4m3fn or any(part in name for part in linear):
        data, scale = quantize_fp8_block(tensor.float())
        return [(name, data), (name.removesuffix("weight") + "scale", scale)]
    return [(name, tensor)]


def fp8_projections(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """e_proj and h_proj in block FP8, as in the original head."""
    if not name.endswith(("e_proj.weight", "h_proj.weight")):
        return [(name, tensor)]
    data, scale = quantize_fp8_block(tensor.float())
    return [(name, data), (f"{name}_scale", scale)]


def aliases(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Copies of embedding and output head in the MTP head."""
    copies = {"embed.weight": "mtp.0.emb.tok_emb.weight", "head.weight": "mtp.0.head.weight"}
    copy = [(copies[name], tensor.clone())] if name in copies else []
    return [(name, tensor), *copy]


def group_index(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The `weight_g_idx` of an activation-ordered GPTQ run."""
    if not name.endswith(".weight_packed"):
        return [(name, tensor)]
    index = torch.arange(8 * tensor.shape[1], dtype=torch.int32) // 128
    return [(name, tensor), (name.replace("weight_packed", "weight_g_idx"), index)]


def twice(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A router bias under both of its names."""
    copy = []
    if name == "layers.1.ffn.gate.bias":
        copy = [(name.replace(".bias", ".e_score_correction_bias"), tensor.clone())]
    return [(name, tensor), *copy]


def distinct(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Other values for the generator's constants, so that every part of a tensor can be told."""
    is_constant = tensor.is_floating_point() and not (tensor.float() != tensor.flatten()[0]).any()
    if is_constant and tensor.numel() > 1:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        tensor = (0.5 + torch.rand(tensor.shape, generator=generator)).to(tensor.dtype)
    return [(name, tensor)]


def both(first: Edit, second: Edit) -> Edit:
    """One edit after the other."""
    return lambda name, tensor: [pair for edited in first(name, tensor) for pair in second(*edited)]


def resize(text: str, *, out: float = 1, cut: float = 1) -> Edit:
    """Tensors whose name has the text, with their first and last size times a factor."""

    def edit(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        if text in name:
            for dim, factor in ((0, out), (-1, cut)):
                size = int(tensor.shape[dim] * factor)
                tensor = torch.cat([tensor, tensor], dim).narrow(dim, 0, size).contiguous()
        return [(name, tensor)]

    return edit


def scales_in_groups_of_64(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The experts' scales, each twice."""
    if ".experts." in name and name.endswith(".weight_scale"):
        tensor = tensor.repeat_interleave(2, dim=1)
    return [(name, tensor)]


BOTH = ("target", "draft")
SCENARIOS: dict[str, Scenario] = {
    "A wide regexes, BF16 compressor": Scenario(BOTH),
    "B FP8 compressor and indexer": Scenario(BOTH, layout={"fp8_compressor": True}),
    "C regexes of checkpoint names only": Scenario(BOTH, targets="native"),
    "D literal names": Scenario(BOTH, targets="literal"),
    "E no mtp.* tensor": Scenario(BOTH, layout={"mtp": False}),
    "F MTP without w2": Scenario(edit=in_head(drop(".w2."))),
    "G MTP experts named gate/up/down_proj": Scenario(
        edit=in_head(names_of_transformers("experts"))
    ),
    "H MTP scales named weight_scale_inv": Scenario(edit=in_head(scale_leaf("weight_scale_inv"))),
    "I MTP scales named scale": Scenario(edit=in_head(scale_leaf("scale"))),
    "J MTP attention in BF16": Scenario(edit=in_head(bf16_attention)),
    "K one MTP attention scale absent": Scenario(edit=drop("mtp.0.attn.wq_b.weight_scale")),
    "L complete, with embedding and head aliases": Scenario(edit=aliases),
    "M one MTP expert absent": Scenario(edit=in_head(drop(".experts.1."))),
    "N MTP router bias absent": Scenario(edit=in_head(drop(".gate.bias"))),
    "O MTP scales as E8M0": Scenario(edit=in_head(scale_type(torch.float8_e8m0fnu))),
    "P MTP scales as uint8": Scenario(edit=in_head(scale_type(torch.uint8))),
    "Q experts named gate/up/down_proj": Scenario(
        ("target",), edit=names_of_transformers("experts")
    ),
    "R experts with weight_g_idx": Scenario(("target",), edit=group_index),
    "S one projection misnamed": Scenario(
        ("target",), edit=rename("layers.1.ffn.experts.2.w1.", "layers.1.ffn.experts.2.gate.")
    ),
    "T one expert absent": Scenario(("target",), edit=drop("layers.1.ffn.experts.2.")),
    "U one attention scale absent": Scenario(
        ("target",), edit=drop("layers.1.attn.wq_b.weight_scale")
    ),
    "MTP names with model. in front": Scenario(edit=rename("mtp.0.", "model.mtp.0.")),
    "MTP names as a layer of the target": Scenario(
        BOTH, edit=rename("mtp.0.", f"layers.{NUM_LAYERS}.")
    ),
    "MTP e_proj and h_proj in FP8": Scenario(edit=fp8_projections),
    "MTP shared experts named gate/up/down_proj": Scenario(
        edit=in_head(names_of_transformers("shared_experts"))
    ),
    "MTP routed experts absent": Scenario(edit=in_head(drop(".ffn.experts."))),
    "MTP w1.weight_packed misnamed": Scenario(
        edit=in_head(rename(".w1.weight_packed", ".w1.qweight"))
    ),
    "MTP of one norm tensor": Scenario(
        edit=in_head(lambda name, tensor: [(name, tensor)] if "enorm" in name else [])
    ),
    "MTP wholly in BF16, regexes say INT4": Scenario(edit=in_head(bf16_head)),
    "MTP wholly in BF16, ignored by its layer": Scenario(
        edit=in_head(bf16_head), ignore=(rf"re:.*layers\.{NUM_LAYERS}\..*",)
    ),
    "MTP wholly in BF16, ignored as mtp": Scenario(
        edit=in_head(bf16_head), ignore=(r"re:.*mtp\..*",)
    ),
    "MTP as DeepSeek published it": Scenario(edit=in_head(original_head)),
    "all as DeepSeek published it": Scenario(BOTH, edit=published_by_deepseek, targets="deepseek"),
    "MTP shard not in the index": Scenario(unlisted="mtp."),
    "compressor scale absent": Scenario(
        ("target",),
        edit=drop("layers.2.attn.compressor.wkv.weight_scale"),
        layout={"fp8_compressor": True},
    ),
    "router bias named e_score_correction_bias": Scenario(
        ("target",), edit=rename(".gate.bias", ".gate.e_score_correction_bias")
    ),
    "router bias given twice": Scenario(("target",), edit=twice),
    "a tensor of another model": Scenario(
        ("target",),
        edit=lambda name, tensor: (
            [(name, tensor), ("layers.1.attn.k_scale", tensor.clone())]
            if name == "norm.weight"
            else [(name, tensor)]
        ),
    ),
    "no two values alike": Scenario(BOTH, edit=both(aliases, distinct)),
    "INT4 in groups of 64": Scenario(BOTH, edit=scales_in_groups_of_64, group_size=64),
    "MTP in groups of 128, the config says 64": Scenario(
        BOTH,
        edit=lambda name, tensor: (
            [(name, tensor)] if name.startswith("mtp.") else scales_in_groups_of_64(name, tensor)
        ),
        group_size=64,
    ),
    "MTP scales of groups twice as wide": Scenario(
        edit=in_head(resize(".w2.weight_scale", cut=0.5))
    ),
    "MTP experts of half the width": Scenario(
        edit=in_head(
            lambda name, tensor: (
                resize(".w2.weight_packed", cut=0.5)(name, tensor)
                if ".w2." in name
                else resize(".weight_packed", out=0.5)(name, tensor)
            )
        )
    ),
    "more query heads than the config's": Scenario(
        ("target",), edit=resize("layers.1.attn.wq_b.weight", out=2)
    ),
    "half the attention sinks": Scenario(("target",), edit=resize("attn_sink", out=0.5)),
    "twice the attention sinks": Scenario(("target",), edit=resize("attn_sink", out=2)),
    "compressor scales of another size": Scenario(
        ("target",),
        edit=resize("layers.2.attn.compressor.wkv.weight_scale", cut=0.5),
        layout={"fp8_compressor": True},
    ),
    "a tensor of another shape": Scenario(
        ("target",),
        edit=lambda name, tensor: [
            (name, tensor[:-128].clone() if name == "layers.1.attn.wq_b.weight" else tensor)
        ],
    ),
}


def set_targets(config: dict[str, Any], scenario: Scenario) -> None:
    """Write the targets as the scenario says.

    `wide` regexes hold checkpoint and fused names, `native` ones the checkpoint's only; `literal`
    is a full name for each layer, as some exporters write it.
    """
    if scenario.targets == "deepseek":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        }
        return
    quantization = config["quantization_config"]
    groups = quantization["config_groups"]
    if scenario.targets == "native":
        groups["attention"]["targets"] = [r"re:.*attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)$"]
        groups["experts"]["targets"] = [r"re:.*ffn\.experts\.\d+\.(w1|w2|w3)$"]
    elif scenario.targets == "literal":
        blocks = [*(f"layers.{layer}" for layer in range(NUM_LAYERS)), "mtp.0"]
        attention = [f"{block}.attn.{name}" for block in blocks for name in ATTENTION]
        groups["attention"]["targets"] = [*attention, "layers.1.attn.indexer.wq_b"]
        shared = [f"{block}.ffn.shared_experts.{w}" for block in blocks for w in EXPERT_NAMES]
        quantization["ignore"] += [*shared, "mtp.0.e_proj", "mtp.0.h_proj"]
    quantization["ignore"] += scenario.ignore
    if scenario.group_size is not None:
        groups["experts"]["weights"]["group_size"] = scenario.group_size


@cache
def unbroken(options: FullSizeConfig) -> list[dict[str, torch.Tensor]]:
    """The tensors of each shard, before the edit."""
    config = model_config(options, flash_config() | TINY)
    specs = checkpoint_tensors(config, options.mtp, options.fp8_compressor)
    return list(shards(config, specs, Draw(0, "cpu")))


def write(folder: Path, scenario: Scenario) -> None:
    """Write the scenario's checkpoint."""
    options = FullSizeConfig(layers=NUM_LAYERS, **scenario.layout)
    config = model_config(options, flash_config() | TINY)
    set_targets(config, scenario)

    def edited() -> Iterator[dict[str, torch.Tensor]]:
        edit = scenario.edit or (lambda name, tensor: [(name, tensor)])
        for tensors in unbroken(options):
            pairs = [pair for name, tensor in tensors.items() for pair in edit(name, tensor)]
            if pairs:
                yield dict(pairs)

    write_checkpoint(folder, config, edited())
    if scenario.unlisted is not None:
        index = json.loads((folder / INDEX).read_text())
        listed = index["weight_map"]
        index["weight_map"] = {n: s for n, s in listed.items() if scenario.unlisted not in n}
        (folder / INDEX).write_text(json.dumps(index))
