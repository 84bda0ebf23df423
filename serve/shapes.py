"""Names, types and shapes of a W4A16 + FP8 DeepSeek-V4 checkpoint, from its config alone.

The layout is the published one: routed experts INT4 in groups of 128 (`pack-quantized`), attention
FP8 in blocks of 128 x 128 with FP32 scales, the rest BF16 or FP32, original DeepSeek names. No
tensor library is needed: `serve plan` works where no checkpoint and no engine is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLASH_CONFIG = Path(__file__).parent / "flash.json"
FP8_BLOCK = 128
INT4_GROUP = 128
CODES_PER_WORD = 8
# safetensors' names of the types
TYPE_BYTES = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4,
              "I64": 8}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint, as a safetensors header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * TYPE_BYTES[self.dtype]


def flash_config() -> dict[str, Any]:
    """The config of DeepSeek-V4-Flash in W4A16 + FP8 with its MTP head."""
    return json.loads(FLASH_CONFIG.read_text(encoding="utf-8"))


def checkpoint_tensors(
    config: Mapping[str, Any], mtp: bool = True, fp8_compressor: bool = False
) -> Iterator[TensorSpec]:
    """Every tensor of the checkpoint, layer by layer.

    Args:
        config: config.json; `num_hidden_layers` and the sizes in it are used.
        mtp: with the MTP head, its expert in INT4 and its attention in FP8.
        fp8_compressor: compressor and indexer in FP8, as the base was first published.
    """
    layers = config["num_hidden_layers"]
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield TensorSpec("embed.weight", "BF16", (vocab, hidden))
    for layer, ratio in enumerate(config["compress_ratios"][:layers]):
        hashed = layer < config["num_hash_layers"]
        yield from _block(f"layers.{layer}.", config, ratio, hashed, fp8_compressor)
    yield TensorSpec("norm.weight", "BF16", (hidden,))
    yield from _hc_head("", config)
    yield TensorSpec("head.weight", "BF16", (vocab, hidden))
    if not mtp:
        return
    for head in range(config["num_nextn_predict_layers"]):
        prefix = f"mtp.{head}."
        for name in ("enorm", "hnorm", "norm"):
            yield TensorSpec(f"{prefix}{name}.weight", "BF16", (hidden,))
        for name in ("e_proj", "h_proj"):
            yield TensorSpec(f"{prefix}{name}.weight", "BF16", (hidden, hidden))
        yield from _block(prefix, config, 0, False, fp8_compressor)
        yield from _hc_head(prefix, config)


def _hc_head(prefix: str, config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    hc = config["hc_mult"]
    yield TensorSpec(f"{prefix}hc_head_fn", "F32", (hc, hc * config["hidden_size"]))
    yield TensorSpec(f"{prefix}hc_head_base", "F32", (hc,))
    yield TensorSpec(f"{prefix}hc_head_scale", "F32", (1,))


def _block(
    prefix: str, config: Mapping[str, Any], ratio: int, hashed: bool, fp8_compressor: bool
) -> Iterator[TensorSpec]:
    """One decoder layer."""
    hidden, hc = config["hidden_size"], config["hc_mult"]
    for name in ("attn_norm", "ffn_norm"):
        yield TensorSpec(f"{prefix}{name}.weight", "BF16", (hidden,))
    mix = (2 + hc) * hc
    for name in ("attn", "ffn"):
        yield TensorSpec(f"{prefix}hc_{name}_fn", "F32", (mix, hc * hidden))
        yield TensorSpec(f"{prefix}hc_{name}_base", "F32", (mix,))
        yield TensorSpec(f"{prefix}hc_{name}_scale", "F32", (3,))
    yield from _attention(f"{prefix}attn.", config, ratio, fp8_compressor)
    yield from _experts(f"{prefix}ffn.", config, hashed)


def _attention(
    prefix: str, config: Mapping[str, Any], ratio: int, fp8_compressor: bool
) -> Iterator[TensorSpec]:
    hidden, heads, head_dim = (
        config[key] for key in ("hidden_size", "num_attention_heads", "head_dim")
    )
    q_rank, groups = config["q_lora_rank"], config["o_groups"]
    o_width = groups * config["o_lora_rank"]
    yield from _fp8(f"{prefix}wq_a", q_rank, hidden)
    yield from _fp8(f"{prefix}wq_b", heads * head_dim, q_rank)
    yield from _fp8(f"{prefix}wkv", head_dim, hidden)
    yield from _fp8(f"{prefix}wo_a", o_width, heads * head_dim // groups)
    yield from _fp8(f"{prefix}wo_b", hidden, o_width)
    yield TensorSpec(f"{prefix}q_norm.weight", "BF16", (q_rank,))
    yield TensorSpec(f"{prefix}kv_norm.weight", "BF16", (head_dim,))
    yield TensorSpec(f"{prefix}attn_sink", "F32", (heads,))
    linear = _fp8 if fp8_compressor else _bf16
    if ratio > 1:
        yield from _compressor(f"{prefix}compressor.", hidden, ratio, head_dim, linear)
    if ratio == 4:
        index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
        # The indexer's queries are FP8 in every published layout; the engine keeps them so.
        yield from _fp8(f"{prefix}indexer.wq_b", index_heads * index_dim, q_rank)
        yield from linear(f"{prefix}indexer.weights_proj", index_heads, hidden)
        yield from _compressor(f"{prefix}indexer.compressor.", hidden, ratio, index_dim, linear)


def _compressor(prefix: str, hidden: int, ratio: int, dim: int, linear) -> Iterator[TensorSpec]:
    width = (2 if ratio == 4 else 1) * dim
    yield from linear(f"{prefix}wkv", width, hidden)
    yield from linear(f"{prefix}wgate", width, hidden)
    yield TensorSpec(f"{prefix}ape", "F32", (ratio, width))
    yield TensorSpec(f"{prefix}norm.weight", "BF16", (dim,))


def _experts(prefix: str, config: Mapping[str, Any], hashed: bool) -> Iterator[TensorSpec]:
    hidden, inter = config["hidden_size"], config["moe_intermediate_size"]
    num_experts = config["n_routed_experts"]
    shapes = {"w1": (inter, hidden), "w2": (hidden, inter), "w3": (inter, hidden)}
    yield TensorSpec(f"{prefix}gate.weight", "BF16", (num_experts, hidden))
    if hashed:
        table = (config["vocab_size"], config["num_experts_per_tok"])
        yield TensorSpec(f"{prefix}gate.tid2eid", "I64", table)
    else:
        yield TensorSpec(f"{prefix}gate.bias", "F32", (num_experts,))
    for name, shape in shapes.items():
        yield from _bf16(f"{prefix}shared_experts.{name}", *shape)
    for expert in range(num_experts):
        for name, shape in shapes.items():
            yield from _int4(f"{prefix}experts.{expert}.{name}", *shape)


def _bf16(name: str, out_features: int, in_features: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", "BF16", (out_features, in_features))


def _fp8(name: str, out_features: int, in_features: int) -> Iterator[TensorSpec]:
    blocks = (math.ceil(out_features / FP8_BLOCK), math.ceil(in_features / FP8_BLOCK))
    yield TensorSpec(f"{name}.weight", "F8_E4M3", (out_features, in_features))
    yield TensorSpec(f"{name}.weight_scale", "F32", blocks)


def _int4(name: str, out_features: int, in_features: int) -> Iterator[TensorSpec]:
    words, groups = in_features // CODES_PER_WORD, in_features // INT4_GROUP
    yield TensorSpec(f"{name}.weight_packed", "I32", (out_features, words))
    yield TensorSpec(f"{name}.weight_scale", "BF16", (out_features, groups))
    yield TensorSpec(f"{name}.weight_shape", "I64", (2,))
