"""Quantization targets that name the MTP head, in the names that vLLM builds it under.

A compressed-tensors config may say `mtp.0.attn.wq_a` or `re:.*mtp\\..*`; vLLM builds the head as
layer `num_hidden_layers`, so such entries match nothing and the head gets another scheme than the
config asks for. `align_mtp_targets` rewrites them.
"""

from __future__ import annotations

import re
from typing import Any

LITERAL = re.compile(r"(?:model\.)?mtp\.(\d+)\.(.+)")
# `mtp\.`, then optionally one layer number or a class that stands for any, as regexes spell them.
PATTERN = re.compile(r"mtp\\?\.(?:(\d+)\\?\.|(?:\\d|\[0-9\])[+*]?\\?\.)?")


def align_target(target: str, num_hidden_layers: int, num_mtp_layers: int) -> str:
    """One target or ignore entry, in vLLM's names.

    Raises:
        ValueError: a regex that names the head of a model with several MTP layers by no number.
    """
    if literal := LITERAL.fullmatch(target):
        return f"model.layers.{num_hidden_layers + int(literal[1])}.{literal[2]}"
    if not target.startswith("re:"):
        return target

    def layer(match: re.Match[str]) -> str:
        if match[1] is None and num_mtp_layers != 1:
            raise ValueError(
                f"quantization target {target!r}: {num_mtp_layers} MTP layers; name each by number"
            )
        return rf"layers\.{num_hidden_layers + int(match[1] or 0)}\."

    return PATTERN.sub(layer, target)


def align_mtp_targets(quant_config: Any, num_hidden_layers: int, num_mtp_layers: int) -> None:
    """Rewrite the targets and ignores of a `CompressedTensorsConfig` in place; others are kept."""
    targets = getattr(quant_config, "target_scheme_map", None)
    if targets is None:
        return

    def align(target: str) -> str:
        return align_target(target, num_hidden_layers, num_mtp_layers)

    quant_config.target_scheme_map = {align(target): scheme for target, scheme in targets.items()}
    quant_config.ignore = [align(target) for target in quant_config.ignore]
