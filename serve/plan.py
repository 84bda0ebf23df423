"""Memory of a profile on its cards, from config and headers alone; nothing is loaded.

Weights and KV cache follow the checkpoint's shapes and vLLM's own rules. What vLLM allocates by a
formula is computed by it. Activations, graphs and the CUDA context are predictions and are called
so: the first start on the real cards measures them.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.weights import FP8_BLOCK, INT4_GROUP
from serve.checkpoint import HEADER_LEN_BYTES, INDEX_NAME, read_json
from serve.errors import CheckpointError, ConfigError, PlanError
from serve.kv_cache import BATCHES_IN_FLIGHT, INDEX_ROW_BYTES, KvLayout, kv_layout
from serve.profiles import Device, Profile
from serve.shapes import TensorSpec, checkpoint_tensors, flash_config

MIB, GIB = 2**20, 2**30
CARD_MIB = 97_887  # RTX PRO 6000 Blackwell Max-Q, as nvidia-smi reports it
BLOCK = r"(?:layers|mtp)\.\d+\."

# Cut along one dimension over the ranks; everything else is on every rank.
SHARDED = re.compile(
    rf"embed\.weight|head\.weight|{BLOCK}attn\.(wq_b|wo_a|wo_b)\.\w+"
    rf"|{BLOCK}ffn\.(shared_experts|experts\.\d+)\.w[123]\.(weight|weight_packed|weight_scale)"
)
REPLICATED = re.compile(
    rf"norm\.weight|hc_head_(fn|base|scale)|{BLOCK}(hc_\w+|\w*norm\.weight|[eh]_proj\.\w+)"
    rf"|{BLOCK}attn\.(wq_a|wkv|q_norm|kv_norm)\.\w+|{BLOCK}attn\.attn_sink"
    rf"|{BLOCK}attn\.(indexer\.)?compressor\.((wkv|wgate|norm)\.\w+|ape)"
    rf"|{BLOCK}attn\.indexer\.(wq_b|weights_proj)\.\w+"
    rf"|{BLOCK}ffn\.gate\.(weight|bias|e_score_correction_bias|tid2eid)"
    rf"|{BLOCK}ffn\.experts\.\d+\.w[123]\.weight_shape"
)
# Copies of the target's that a head may carry; vLLM shares the target's.
SHARED_WITH_TARGET = re.compile(r"mtp\.\d+\.(emb\.tok_emb|head)\.weight")
# FP8 on disk, BF16 in memory.
DEQUANTIZED = re.compile(
    rf"{BLOCK}attn\.((indexer\.)?compressor\.(wkv|wgate)|indexer\.weights_proj)\.\w+"
    r"|mtp\.\d+\.[eh]_proj\.\w+"
)

# Predictions, in bytes; see the module's text.
# A load of the same trunk at TP 2, without MTP, was reported as 73.25 GiB a card; its shapes and
# rotary tables give 72.2.
LOAD_OVERHEAD_BYTES = 1 * GIB
CONTEXT_BYTES = 900 * MIB  # CUDA context, NCCL's buffers, loaded kernels
GRAPH_BYTES = 500 * MIB
INDEXER_LOGITS_BYTES = 512 * MIB  # the budget vLLM cuts its prefill chunks to
FLASHINFER_WORKSPACE_BYTES = 128 * MIB
LONG_CONTEXT_TOKENS = 256 * 1024
VOCABULARY_PADDING = 64  # vLLM's


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights on each rank."""

    sharded_bytes: int
    replicated_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.sharded_bytes + self.replicated_bytes


@dataclass(frozen=True)
class Plan:
    """Memory of one card under a profile. Bytes, unless a name says otherwise."""

    profile: str
    tensor_parallel_size: int
    card_bytes: int
    usable_bytes: int
    weights_sharded_bytes: int
    weights_replicated_bytes: int
    buffers: dict[str, int]
    predicted: dict[str, int]
    kv_bytes: int
    kv_block_bytes: int
    kv_token_bytes: float
    kv_blocks: int
    request_blocks: int
    window_blocks: int
    needed_blocks: int
    max_model_len: int
    max_num_seqs: int

    @property
    def fits(self) -> bool:
        return self.kv_blocks >= self.needed_blocks

    @property
    def spare_bytes(self) -> int:
        return (self.kv_blocks - self.needed_blocks) * self.kv_block_bytes


def rank_weights(tensors: Iterable[TensorSpec], tensor_parallel_size: int) -> Weights:
    """Weights on one rank.

    Raises:
        CheckpointError: a tensor that is not known to be cut or copied.
    """
    sharded = replicated = 0
    unknown = []
    for tensor in tensors:
        name = tensor.name.removeprefix("model.")
        size = memory_bytes(tensor, name)
        if SHARDED.fullmatch(name):
            sharded += -(-size // tensor_parallel_size)
        elif REPLICATED.fullmatch(name):
            replicated += size
        elif not SHARED_WITH_TARGET.fullmatch(name):
            unknown.append(tensor.name)
    if unknown:
        raise CheckpointError(
            f"plan: {len(unknown)} tensors of unknown use, the first {sorted(unknown)[0]}"
        )
    return Weights(sharded, replicated)


def memory_bytes(tensor: TensorSpec, name: str) -> int:
    """Bytes in memory, where the engine's type differs from the file's."""
    if name.endswith(".tid2eid"):
        return tensor.num_bytes // 2  # int32
    if DEQUANTIZED.fullmatch(name):
        if name.endswith(("scale", "scale_inv")):
            return 0
        return tensor.num_bytes * (2 if tensor.dtype == "F8_E4M3" else 1)
    return tensor.num_bytes


def check_split(config: Mapping[str, Any], profile: Profile) -> None:
    """Refuse a number of ranks that the model cannot be cut into.

    A rank takes whole heads, whole groups of the output projection, and of each matrix whole
    quantization groups or blocks. The indexer's heads are not cut.

    Raises:
        PlanError: with each size that does not divide.
    """
    heads, groups = config["num_attention_heads"], config["o_groups"]
    vocabulary = math.ceil(config["vocab_size"] / VOCABULARY_PADDING) * VOCABULARY_PADDING
    whole = {
        "num_attention_heads": (heads, 1),
        "num_attention_heads * head_dim": (heads * config["head_dim"], FP8_BLOCK),
        "o_groups": (groups, 1),  # vLLM rounds down
        "o_groups * o_lora_rank": (groups * config["o_lora_rank"], FP8_BLOCK),
        "moe_intermediate_size": (config["moe_intermediate_size"], INT4_GROUP),
        "vocab_size, padded": (vocabulary, 1),
    }
    ranks = profile.tensor_parallel_size
    odd = [
        f"{name} = {size}" + (f" in multiples of {unit}" if unit > 1 else "")
        for name, (size, unit) in whole.items()
        if size % (ranks * unit)
    ]
    if odd:
        raise PlanError(
            f"profile {profile.name}: tensor_parallel_size = {ranks} does not divide "
            + "; ".join(odd)
        )


def fixed_buffers(config: Mapping[str, Any], profile: Profile) -> dict[str, int]:
    """What vLLM allocates once, by its own formulas."""
    tokens, window = profile.max_num_batched_tokens, profile.max_model_len
    mtp = bool(profile.num_speculative_tokens)
    # Prefill gathers the indexer's keys: 8 * factor times the window, 4 tokens a key.
    factor = 5 if window <= LONG_CONTEXT_TOKENS else 2
    buffers = {
        "rotary tables": 2 * config["max_position_embeddings"] * config["qk_rope_head_dim"] * 4,
        "indexer keys of a prefill": window * 8 * factor // 4 * INDEX_ROW_BYTES,
        "top-k indices": tokens * config["index_topk"] * 4 * (1 + mtp),
        "FlashInfer workspace": FLASHINFER_WORKSPACE_BYTES,
    }
    if mtp:
        buffers["hidden states for the draft"] = tokens * config["hc_mult"] * config[
            "hidden_size"
        ] * 2  # fmt: skip
    return buffers


def predicted_bytes(config: Mapping[str, Any], profile: Profile) -> dict[str, int]:
    """Allowances; none of them was measured on the cards."""
    tokens, ranks = profile.max_num_batched_tokens, profile.tensor_parallel_size
    hidden = config["hidden_size"]
    streams = 3 * tokens * config["hc_mult"] * hidden * 2
    attention = 3 * tokens * config["num_attention_heads"] // ranks * config["head_dim"] * 2
    inter = config["moe_intermediate_size"] // ranks
    experts = tokens * config["num_experts_per_tok"] * (3 * inter + hidden) * 2
    rows = profile.max_num_seqs * (1 + profile.num_speculative_tokens)
    return {
        "what a load takes beyond its shapes": LOAD_OVERHEAD_BYTES,
        "activations of a prefill": streams + max(attention, experts),
        "indexer logits": INDEXER_LOGITS_BYTES,
        "logits": 3 * rows * config["vocab_size"] * 4,
        "CUDA graphs": 0 if profile.enforce_eager else GRAPH_BYTES,
        "CUDA context and NCCL": CONTEXT_BYTES,
    }


def needed_blocks(layout: KvLayout, profile: Profile) -> tuple[int, int, int]:
    """KV blocks of one request while it prefills, while it decodes, and of all streams.

    All streams have the full window; they are admitted one after another, so that only one
    prefills. vLLM itself refuses to start when the first number does not fit.
    """
    in_flight = BATCHES_IN_FLIGHT * profile.max_num_batched_tokens
    prefilling = layout.request_blocks(profile.max_model_len, in_flight)
    step_tokens = BATCHES_IN_FLIGHT * (1 + profile.num_speculative_tokens)
    decoding = layout.request_blocks(profile.max_model_len, step_tokens)
    return prefilling, decoding, prefilling + (profile.max_num_seqs - 1) * decoding


def make_plan(profile: Profile, config: Mapping[str, Any], tensors: Iterable[TensorSpec]) -> Plan:
    """Memory of each card.

    Raises:
        ConfigError: the profile is not for GPUs.
        PlanError: the model cannot be cut into so many ranks.
    """
    if profile.device is not Device.CUDA:
        raise ConfigError(f"profile {profile.name}: device = 'cpu'; a plan is for cuda")
    check_split(config, profile)
    weights = rank_weights(tensors, profile.tensor_parallel_size)
    card = CARD_MIB * MIB
    usable = int(card * profile.gpu_memory_utilization)
    buffers, predicted = fixed_buffers(config, profile), predicted_bytes(config, profile)
    taken = weights.total_bytes + sum(buffers.values()) + sum(predicted.values())
    layout = kv_layout(config, mtp=bool(profile.num_speculative_tokens))
    kv_bytes = max(usable - taken, 0)
    prefilling, decoding, needed = needed_blocks(layout, profile)
    return Plan(
        profile=profile.name,
        tensor_parallel_size=profile.tensor_parallel_size,
        card_bytes=card,
        usable_bytes=usable,
        weights_sharded_bytes=weights.sharded_bytes,
        weights_replicated_bytes=weights.replicated_bytes,
        buffers=buffers,
        predicted=predicted,
        kv_bytes=kv_bytes,
        kv_block_bytes=layout.block_bytes,
        kv_token_bytes=layout.token_bytes,
        kv_blocks=kv_bytes // layout.block_bytes,
        request_blocks=prefilling,
        window_blocks=decoding,
        needed_blocks=needed,
        max_model_len=profile.max_model_len,
        max_num_seqs=profile.max_num_seqs,
    )


def header_tensors(path: Path) -> list[TensorSpec]:
    """Tensors of a safetensors header; the file may end after it.

    Raises:
        CheckpointError: no such header.
    """
    with path.open("rb") as file:
        prefix = file.read(HEADER_LEN_BYTES)
        try:
            (header_len,) = struct.unpack("<Q", prefix)
            header = json.loads(file.read(header_len))
            header.pop("__metadata__", None)
            return [
                TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
                for name, entry in header.items()
            ]
        except (struct.error, ValueError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint shard {path}: its header is not safetensors JSON"
            ) from error


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], list[TensorSpec], str]:
    """Config and tensors of a checkpoint: from its shards' headers, else from its index.

    Returns:
        (config, tensors, where the shapes come from).
    Raises:
        CheckpointError: there is neither, or the index names what the config does not give.
    """
    config = read_json(folder / "config.json")
    if shards := sorted(folder.glob("*.safetensors")):
        tensors = [tensor for shard in shards for tensor in header_tensors(shard)]
        return config, tensors, "the shards' headers"
    names = set(read_json(folder / INDEX_NAME).get("weight_map", ()))
    fp8_compressor = any(name.endswith("compressor.wkv.weight_scale") for name in names)
    tensors = list(checkpoint_tensors(config, fp8_compressor=fp8_compressor))
    if unknown := sorted(names - {tensor.name for tensor in tensors}):
        raise CheckpointError(f"checkpoint index {folder}: the config gives no {unknown[0]}")
    return config, [t for t in tensors if t.name in names], "the index and the config"


def bundled_checkpoint() -> tuple[dict[str, Any], list[TensorSpec], str]:
    """DeepSeek-V4-Flash as it is described here."""
    config = flash_config()
    return config, list(checkpoint_tensors(config)), "the bundled shapes of DeepSeek-V4-Flash"


def plan_profile(profile: Profile, model: Path | None) -> tuple[Plan, str]:
    """The plan of a profile, and where its shapes come from.

    Without `model` the bundled shapes are used.
    """
    config, tensors, source = read_checkpoint(model) if model else bundled_checkpoint()
    if not profile.num_speculative_tokens:
        tensors = [t for t in tensors if not t.name.removeprefix("model.").startswith("mtp.")]
    return make_plan(profile, config, tensors), source


def render(plan: Plan, source: str) -> str:
    """The plan as a table."""

    def row(label: str, num_bytes: float) -> str:
        return f"  {label:<44}{num_bytes / GIB:>9.2f} GiB"

    lines = [
        f"profile {plan.profile}: each of {plan.tensor_parallel_size} cards, "
        f"{plan.card_bytes // MIB:,} MiB; shapes from {source}",
        row(f"usable ({plan.usable_bytes / plan.card_bytes:.0%})", plan.usable_bytes),
        row("weights, this rank's part", plan.weights_sharded_bytes),
        row("weights, copied to every rank", plan.weights_replicated_bytes),
        *(row(label, size) for label, size in plan.buffers.items()),
        *(row(f"prediction: {label}", size) for label, size in plan.predicted.items()),
        row("left for the KV cache", plan.kv_bytes),
        "",
        f"  KV cache: {plan.kv_token_bytes:,.0f} B for one more token of context; "
        f"{plan.kv_blocks:,} blocks of {plan.kv_block_bytes:,} B",
        f"  one request of {plan.max_model_len:,} tokens: {plan.request_blocks:,} blocks while it "
        f"prefills, {plan.window_blocks:,} while it decodes",
        f"  {plan.max_num_seqs} such requests: {plan.needed_blocks:,} blocks, "
        f"{plan.needed_blocks * plan.kv_block_bytes / GIB:.2f} GiB",
    ]
    if plan.fits:
        lines.append(f"  fits; {plan.spare_bytes / GIB:.2f} GiB to spare, predictions included")
    else:
        lines.append(f"  does not fit; {-plan.spare_bytes / GIB:.2f} GiB short")
    return "\n".join(lines)


def run_plan(profile: Profile, model: Path | None, as_json: bool) -> None:
    """Print the plan.

    Raises:
        PlanError: the profile does not fit, or its ranks cannot share the model.
    """
    plan, source = plan_profile(profile, model)
    if as_json:
        body = asdict(plan) | {"fits": plan.fits, "spare_bytes": plan.spare_bytes, "from": source}
        print(json.dumps(body, indent=1))
    else:
        print(render(plan, source))
    if not plan.fits:
        raise PlanError(
            f"profile {profile.name}: {plan.needed_blocks:,} KV blocks are needed and "
            f"{plan.kv_blocks:,} fit; lower max_num_batched_tokens, max_num_seqs or max_model_len"
        )
