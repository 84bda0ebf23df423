"""Which quantization scheme the targets of a compressed-tensors config give a module of vLLM's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kernels.weights import Kind, Weight

FP8, INT4, NONE = "float8 block", "int4 group", "none"
PACKED = {
    "gate_up_proj": ["w1", "w3"],
    "fused_wqa_wkv": ["wq_a", "wkv"],
    "fused_wkv_wgate": ["wkv", "wgate"],
}
# A weight's place in the checkpoint -> the module that vLLM builds for it, where they differ.
MODULES = {
    ".attn.wq_a": ".attn.fused_wqa_wkv",
    ".attn.wkv": ".attn.fused_wqa_wkv",
    ".shared_experts.w1": ".shared_experts.gate_up_proj",
    ".shared_experts.w3": ".shared_experts.gate_up_proj",
    ".shared_experts.w2": ".shared_experts.down_proj",
}
# The schemes that each kind of weight has a form for.
ALLOWED = {Kind.EXPERT: (INT4,), Kind.ATTENTION: (FP8, NONE), Kind.PROJECTION: (NONE,)}


def scheme_of(quantization: Mapping[str, Any], name: str) -> str:
    """The scheme of `model.layers.N.<module>`, as vLLM reads the targets."""
    parent, _, last = name.rpartition(".")
    names = [name, *(f"{parent}.{part}" for part in PACKED.get(last, ()))]
    if any(_matches(t, n) for t in quantization.get("ignore") or () for n in names):
        return NONE
    for group in quantization["config_groups"].values():
        if any(_matches(t, name) for t in group["targets"]) or all(
            any(_matches(t, n) for t in group["targets"]) for n in names[1:] or [name]
        ):
            weights = group["weights"]
            return f"{weights.get('type')}{weights.get('num_bits')} {weights.get('strategy')}"
    return NONE


def scheme_of_weight(config: Mapping[str, Any], weight: Weight) -> str | None:
    """The scheme of the module that a trunk weight belongs to; None where config tells none.

    A config that cannot be read is `matching.config_faults`' to name.
    """
    place = f".{weight.stem}"
    for end, module in MODULES.items():
        if place.endswith(end):
            place = place.removesuffix(end) + module
    try:
        return scheme_of(config["quantization_config"], f"model{place}")
    except (AttributeError, KeyError, TypeError, re.error):
        return None


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    # vLLM renames what is spelled as in the checkpoint.
    if target.startswith("layers."):
        target = f"model.{target}".replace(".shared_experts.w2", ".shared_experts.down_proj")
    return target in (module, "Linear")
