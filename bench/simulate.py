"""Decode speed predicted from bytes: a roofline of one stream, tensor parallel over a few cards.

    step = bytes / (bandwidth x efficiency) + all-reduces + gaps

A verified step reads the experts that its tokens need, and each draft step reads the MTP layer and
the head. Everything here is a prediction; nothing is measured. KV reads are left out: they are
small to 128k, and the indexer's scan, which grows with the context, is not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

LABEL = "prediction, not a measurement"
BF16, FP32, FP8 = 2.0, 4.0, 1.0  # bytes per weight
INT4_GROUP_128 = 0.5 + 2 / 128  # codes, and a 16-bit scale per 128 of them
# Tokens verified together are of one text and share experts: of the experts beyond those of one
# token, so much is read.
EXPERT_OVERLAP = 0.75
MANY_TOKENS_ALL_REDUCE = 1.1  # an all-reduce of several tokens against one of a single token
ALL_REDUCES_PER_LAYER = 2
ALL_REDUCES_PER_DRAFT = 4
DRAFT_GAP_MS = 0.05


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one card reads for a token: of one layer, averaged over layers, but the last two.

    routed: experts of a single token. lm_head: once a step. mtp: once a draft step, lm_head
    included.
    """

    routed: float
    shared: float
    attention: float
    compressor: float
    indexer: float
    hyper_connections: float
    router: float
    lm_head: float
    mtp: float

    def other(self) -> float:
        """Of one layer, without the routed experts."""
        return (
            self.shared + self.attention + self.compressor + self.indexer
            + self.hyper_connections + self.router
        )  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What is put in. kernel_us: measured time of a part per layer, instead of its bytes.

    The part `lm_head` is per step. Keys are names of LayerBytes; `routed` is of one token.
    """

    bandwidth_gb_s: float = 1792.0  # one RTX PRO 6000
    efficiency: float = 0.62
    all_reduce_us: float = 9.0
    gaps_ms: float = 1.0
    kernel_us: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bandwidth_gb_s <= 0 or not 0 < self.efficiency <= 1:
            raise ValueError(
                f"bandwidth_gb_s = {self.bandwidth_gb_s}, efficiency = {self.efficiency}; "
                "the first must be above 0 and the second in (0, 1]"
            )
        if self.all_reduce_us < 0 or self.gaps_ms < 0:
            raise ValueError(
                f"all_reduce_us = {self.all_reduce_us}, gaps_ms = {self.gaps_ms}; at least 0"
            )
        known = {f.name for f in fields(LayerBytes)} - {"mtp"}
        if unknown := set(self.kernel_us) - known:
            raise ValueError(f"kernel_us {sorted(unknown)}; parts are {sorted(known)}")

    def ms(self, num_bytes: float) -> float:
        """Time to read so many bytes."""
        return num_bytes / (self.bandwidth_gb_s * self.efficiency * 1e6)


def layer_bytes(config: Mapping[str, Any], num_cards: int = 2, dense: float = BF16) -> LayerBytes:
    """Bytes of a DeepSeek-V4 in W4A16 experts and FP8 attention.

    Args:
        config: a checkpoint's config.json.
        dense: bytes per weight of shared experts, lm_head and compressors, BF16 as published.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim, q_rank = config["head_dim"], config["q_lora_rank"]
    expert = 3 * hidden * config["moe_intermediate_size"] / num_cards
    o_rank = config["o_groups"] * config["o_lora_rank"]
    sharded = q_rank * heads * head_dim + heads * head_dim * config["o_lora_rank"] + o_rank * hidden
    replicated = hidden * q_rank + hidden * head_dim
    ratios = config["compress_ratios"][: config["num_hidden_layers"]]
    # Ratio 4 has two overlapping windows, so two gates and values of head_dim; larger ones one.
    windows = sum({0: 0, 4: 2}.get(ratio, 1) for ratio in ratios) / len(ratios)
    indexed = sum(ratio == 4 for ratio in ratios) / len(ratios)
    index_dim, index_heads = config["index_head_dim"], config["index_n_heads"]
    index_bytes = (
        q_rank * index_heads * index_dim * FP8 / num_cards
        + 2 * hidden * 2 * index_dim * BF16
        + hidden * index_heads * BF16
    )
    hc = config["hc_mult"]
    lm_head = config["vocab_size"] * hidden * dense / num_cards
    parts = {
        "routed": config["num_experts_per_tok"] * expert * INT4_GROUP_128,
        "shared": config["n_shared_experts"] * expert * dense,
        "attention": (sharded / num_cards + replicated) * FP8,
        "hyper_connections": 2 * hc * hidden * (2 * hc + hc * hc) * FP32,
        "router": config["n_routed_experts"] * hidden * BF16,
    }
    return LayerBytes(
        **parts,
        compressor=2 * hidden * head_dim * windows * dense,
        indexer=index_bytes * indexed,
        lm_head=lm_head,
        mtp=sum(parts.values()) + 2 * hidden * hidden * FP8 + lm_head,
    )


def experts_read(config: Mapping[str, Any], num_tokens: int) -> float:
    """Experts of one layer that a step of so many tokens reads, tokens drawing independently, with
    what exceeds one token's cut by EXPERT_OVERLAP."""
    count, each = config["n_routed_experts"], config["num_experts_per_tok"]
    drawn = count * (1 - (1 - each / count) ** num_tokens)
    return each + EXPERT_OVERLAP * (drawn - each)


def step_ms(
    config: Mapping[str, Any], size: LayerBytes, machine: Machine, num_drafts: int
) -> float:
    """One decode step: verification of 1 + num_drafts tokens, and the drafting of the next."""
    layers, tokens = config["num_hidden_layers"], 1 + num_drafts
    share = experts_read(config, tokens) / config["num_experts_per_tok"]
    parts = {f.name: getattr(size, f.name) for f in fields(LayerBytes) if f.name != "mtp"}
    total = 0.0
    for name, num_bytes in parts.items():
        given = machine.kernel_us.get(name)
        ms = machine.ms(num_bytes) if given is None else given / 1000
        total += ms * (1 if name == "lm_head" else layers) * (share if name == "routed" else 1)
    all_reduce_ms = machine.all_reduce_us / 1000
    total += (
        ALL_REDUCES_PER_LAYER * layers * all_reduce_ms
        * (MANY_TOKENS_ALL_REDUCE if num_drafts else 1)
    )  # fmt: skip
    draft_gap = DRAFT_GAP_MS if machine.gaps_ms else 0.0
    draft = machine.ms(size.mtp) + ALL_REDUCES_PER_DRAFT * all_reduce_ms + draft_gap
    return total + machine.gaps_ms + num_drafts * draft


def acceptance_length(per_position: Sequence[float]) -> float:
    """Tokens per step: 1 + the shares of steps whose draft at each position was accepted.

    Raises:
        ValueError: a share outside [0, 1], or larger than that of the position before.
    """
    before = 1.0
    for share in per_position:
        if not 0 <= share <= before:
            raise ValueError(f"acceptance {list(per_position)}; must fall, within [0, 1]")
        before = share
    return 1 + sum(per_position)


def predict(
    config: Mapping[str, Any],
    machine: Machine,
    per_position: Sequence[float] = (),
    num_cards: int = 2,
    dense: float = BF16,
) -> dict[str, Any]:
    """Step time and rate of one stream.

    Args:
        per_position: unconditional acceptance at each draft position, as vLLM's counters give it;
            empty is no speculation.
    """
    size = layer_bytes(config, num_cards, dense)
    ms = step_ms(config, size, machine, len(per_position))
    layers = config["num_hidden_layers"]
    return {
        "label": LABEL,
        "num_speculative_tokens": len(per_position),
        "gb_per_token_per_card": (layers * (size.routed + size.other()) + size.lm_head) / 1e9,
        "acceptance_length": acceptance_length(per_position),
        "step_ms": ms,
        "decode_tok_s": 1000 * acceptance_length(per_position) / ms,
    }
