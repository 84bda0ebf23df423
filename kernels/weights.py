"""Weights of a DeepSeek-V4 checkpoint: names, shapes and stored types, from config.json alone.

A weight is stored in one of three layouts:

| kind       | original                       | W4A16-FP8                                 | BF16 |
|------------|--------------------------------|-------------------------------------------|------|
| EXPERT     | weight I8, scale F8_E8M0       | weight_packed, weight_scale, weight_shape | BF16 |
| ATTENTION  | weight F8_E4M3, scale F8_E8M0  | weight F8_E4M3, weight_scale F32          | BF16 |
| PROJECTION | weight F8_E4M3, scale F8_E8M0  | BF16                                      | BF16 |
| BF16, F32, I64 | as they are                | as they are                               | same |

The MTP head is one decoder layer without compressor and indexer, plus its own norms, two
projections and an output mixer, under `mtp.0.`. No tensor library is needed: a plan of the memory
works where no engine is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

FP4_GROUP = 32
FP8_BLOCK = 128
INT4_GROUP = 128
CODES_PER_WORD = 8
HEAD_PREFIX = "mtp.0."


class Layout(StrEnum):
    ORIGINAL = "original"
    W4A16 = "W4A16"
    BF16 = "BF16"


class Kind(StrEnum):
    EXPERT = "routed expert"
    ATTENTION = "attention"
    PROJECTION = "projection"
    BF16 = "BF16"
    F32 = "F32"
    I64 = "I64"


@dataclass(frozen=True)
class Weight:
    """One weight of the model; `stem` is its name in the original checkpoint without `.weight`."""

    stem: str
    kind: Kind
    shape: tuple[int, ...]
    suffix: str = ".weight"

    @property
    def name(self) -> str:
        return self.stem + self.suffix


@dataclass(frozen=True)
class Spec:
    """One tensor that a checkpoint must hold; the first dtype is the one written here."""

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


def head_weights(config: Mapping[str, Any], prefix: str = HEAD_PREFIX) -> Iterator[Weight]:
    """Weights of one MTP head: 797 in Flash."""
    hidden = config["hidden_size"]
    for name in ("enorm", "hnorm", "norm"):
        yield Weight(f"{prefix}{name}", Kind.BF16, (hidden,))
    for name in ("e_proj", "h_proj"):
        yield Weight(f"{prefix}{name}", Kind.PROJECTION, (hidden, hidden))
    yield from _block(prefix, config, ratio=0, hashed=False)
    yield from _hc_head(prefix, config)


def trunk_weights(config: Mapping[str, Any]) -> Iterator[Weight]:
    """Weights of everything but the MTP head, layer by layer."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    yield Weight("embed", Kind.BF16, (config["vocab_size"], hidden))
    for layer, ratio in enumerate(config["compress_ratios"][:layers]):
        hashed = layer < config["num_hash_layers"]
        yield from _block(f"layers.{layer}.", config, ratio, hashed)
    yield Weight("norm", Kind.BF16, (hidden,))
    yield from _hc_head("", config)
    yield Weight("head", Kind.BF16, (config["vocab_size"], hidden))


def _hc_head(prefix: str, config: Mapping[str, Any]) -> Iterator[Weight]:
    streams = config["hc_mult"]
    shapes = {"fn": (streams, streams * config["hidden_size"]), "base": (streams,), "scale": (1,)}
    for name, shape in shapes.items():
        yield Weight(f"{prefix}hc_head_{name}", Kind.F32, shape, suffix="")


def _block(prefix: str, config: Mapping[str, Any], ratio: int, hashed: bool) -> Iterator[Weight]:
    hidden, streams = config["hidden_size"], config["hc_mult"]
    for name in ("attn_norm", "ffn_norm"):
        yield Weight(f"{prefix}{name}", Kind.BF16, (hidden,))
    mix = (2 + streams) * streams
    for name in ("attn", "ffn"):
        yield Weight(f"{prefix}hc_{name}_fn", Kind.F32, (mix, streams * hidden), suffix="")
        yield Weight(f"{prefix}hc_{name}_base", Kind.F32, (mix,), suffix="")
        yield Weight(f"{prefix}hc_{name}_scale", Kind.F32, (3,), suffix="")
    yield from _attention(f"{prefix}attn.", config, ratio)
    yield from _ffn(f"{prefix}ffn.", config, hashed)


def _attention(prefix: str, config: Mapping[str, Any], ratio: int) -> Iterator[Weight]:
    hidden, heads, head_dim = (
        config[key] for key in ("hidden_size", "num_attention_heads", "head_dim")
    )
    rank, groups = config["q_lora_rank"], config["o_groups"]
    shapes = {
        "wq_a": (rank, hidden),
        "wq_b": (heads * head_dim, rank),
        "wkv": (head_dim, hidden),
        "wo_a": (groups * config["o_lora_rank"], heads * head_dim // groups),
        "wo_b": (hidden, groups * config["o_lora_rank"]),
    }
    for name, shape in shapes.items():
        yield Weight(f"{prefix}{name}", Kind.ATTENTION, shape)
    yield Weight(f"{prefix}q_norm", Kind.BF16, (rank,))
    yield Weight(f"{prefix}kv_norm", Kind.BF16, (head_dim,))
    yield Weight(f"{prefix}attn_sink", Kind.F32, (heads,), suffix="")
    if ratio > 1:
        yield from _compressor(f"{prefix}compressor.", hidden, ratio, head_dim)
    if ratio == 4:
        index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
        yield Weight(f"{prefix}indexer.wq_b", Kind.ATTENTION, (index_heads * index_dim, rank))
        yield Weight(f"{prefix}indexer.weights_proj", Kind.BF16, (index_heads, hidden))
        yield from _compressor(f"{prefix}indexer.compressor.", hidden, ratio, index_dim)


def _compressor(prefix: str, hidden: int, ratio: int, dim: int) -> Iterator[Weight]:
    width = (2 if ratio == 4 else 1) * dim
    yield Weight(f"{prefix}wkv", Kind.BF16, (width, hidden))
    yield Weight(f"{prefix}wgate", Kind.BF16, (width, hidden))
    yield Weight(f"{prefix}ape", Kind.F32, (ratio, width), suffix="")
    yield Weight(f"{prefix}norm", Kind.BF16, (dim,))


def expert_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of w1, w2, w3 of a routed expert."""
    hidden, inter = config["hidden_size"], config["moe_intermediate_size"]
    return {"w1": (inter, hidden), "w2": (hidden, inter), "w3": (inter, hidden)}


def _ffn(prefix: str, config: Mapping[str, Any], hashed: bool) -> Iterator[Weight]:
    hidden, experts = config["hidden_size"], config["n_routed_experts"]
    yield Weight(f"{prefix}gate", Kind.BF16, (experts, hidden))
    if hashed:
        table = (config["vocab_size"], config["num_experts_per_tok"])
        yield Weight(f"{prefix}gate.tid2eid", Kind.I64, table, suffix="")
    else:
        yield Weight(f"{prefix}gate.bias", Kind.F32, (experts,), suffix="")
    shared = config["moe_intermediate_size"] * config["n_shared_experts"]
    for name, shape in {
        "w1": (shared, hidden),
        "w2": (hidden, shared),
        "w3": (shared, hidden),
    }.items():
        yield Weight(f"{prefix}shared_experts.{name}", Kind.PROJECTION, shape)
    for expert in range(experts):
        for name, shape in expert_shapes(config).items():
            yield Weight(f"{prefix}experts.{expert}.{name}", Kind.EXPERT, shape)


def tensors(weight: Weight, layout: Layout) -> tuple[Spec, ...]:
    """What a weight is stored as."""
    quantized = weight.kind in (Kind.EXPERT, Kind.ATTENTION, Kind.PROJECTION)
    if not quantized:
        return (Spec(weight.name, (weight.kind.value,), weight.shape),)
    out_features, in_features = weight.shape
    blocks = (math.ceil(out_features / FP8_BLOCK), math.ceil(in_features / FP8_BLOCK))
    if layout == Layout.ORIGINAL and weight.kind == Kind.EXPERT:
        return (
            Spec(weight.name, ("I8",), (out_features, in_features // 2)),
            Spec(f"{weight.stem}.scale", ("F8_E8M0",), (out_features, in_features // FP4_GROUP)),
        )
    if layout == Layout.ORIGINAL:
        return (
            Spec(weight.name, ("F8_E4M3",), weight.shape),
            Spec(f"{weight.stem}.scale", ("F8_E8M0",), blocks),
        )
    if layout == Layout.W4A16 and weight.kind == Kind.EXPERT:
        return (
            Spec(
                f"{weight.stem}.weight_packed",
                ("I32",),
                (out_features, in_features // CODES_PER_WORD),
            ),
            Spec(
                f"{weight.stem}.weight_scale", ("BF16",), (out_features, in_features // INT4_GROUP)
            ),
            Spec(f"{weight.stem}.weight_shape", ("I64",), (2,)),
        )
    if layout == Layout.W4A16 and weight.kind == Kind.ATTENTION:
        return (
            Spec(weight.name, ("F8_E4M3",), weight.shape),
            Spec(f"{weight.stem}.weight_scale", ("F32", "F8_E8M0"), blocks),
        )
    return (Spec(weight.name, ("BF16",), weight.shape),)


def is_compressor(stem: str) -> bool:
    """Whether stock vLLM builds this module without quantization although bases store it FP8."""
    return re.search(r"compressor\.(wkv|wgate)$|indexer\.weights_proj$", stem) is not None


# config.json's expert_dtype for W4A16-FP8. vLLM asks only whether it is "fp4", as an absent one is
# for it: MegaMoE would then take the experts, and its CPU class rename attention's scales.
EXPERT_DTYPE = "int4"

# config.json's entry for W4A16-FP8. Regular expressions that also match layer `num_hidden_layers`,
# under which the engine builds the head: targets spelled `mtp.0...` never match. Each group states
# its own format: the global "mixed-precision" is no format that a layer can have.
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
