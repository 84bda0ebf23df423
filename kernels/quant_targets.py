"""Quantization targets that name the MTP head, in the names that vLLM builds it under.

A compressed-tensors config may say `mtp.0.attn.wq_a` or `re:.*mtp\\..*`; vLLM builds the head as
layer `num_hidden_layers`, so such entries match nothing and the head gets another scheme than the
config asks for. `use_vllm_names` rewrites them, and refuses those that it cannot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kernels.loading import FUSED, RENAMED
from kernels.weights import head_weights

LITERAL = re.compile(r"(?:model\.)?mtp\.(\d+)\.(.+)")
# A dot that is not repeated: of `mtp.*` the dot belongs to what follows.
DOT = r"\\?\.(?![*+?{])"
# `mtp\.`, then optionally one layer number or a class that stands for any, as regexes spell them;
# or `mtp` alone, before anything or at the end of a group.
PATTERN = re.compile(rf"mtp(?:{DOT}(?:(?:(\d+)|(?:\\d|\[0-9\])[+*]?)(?:{DOT})?)?|(?=\.[*+]|\)))")
EXCLUDES = re.compile(r"\(\?<?!")
# Before an `mtp` with which a name begins: `re:`, `^`, a group, an alternative, a lookahead. vLLM
# matches from the beginning of its own names, and those have `model.` there.
BEGINS = ":^(|!="


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
        model = r"(?:model\.)?" if target[match.start() - 1] in BEGINS else ""
        dot = r"\." if match[0].endswith(".") else ""
        return rf"{model}layers\.{num_hidden_layers + int(match[1] or 0)}{dot}"

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


def head_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Modules of the head, fused ones too: name after `mtp.` in a checkpoint -> vLLM's name."""
    stems = {weight.stem for weight in head_weights(config, prefix="")}
    for fused, parts in {**FUSED, **{name: (part,) for name, part in RENAMED.items()}}.items():
        for parent, _, last in [stem.rpartition(".") for stem in stems]:
            if last in parts:
                stems.add(f"{parent}.{fused}")
    first = config["num_hidden_layers"]
    return {
        f"{head}.{stem}": f"model.layers.{first + head}.{stem}"
        for head in range(config["num_nextn_predict_layers"])
        for stem in stems
    }


def check_target(target: str, aligned: str, modules: Mapping[str, str], may_be_idle: bool) -> None:
    """Refuse an entry that selects other modules of the head in vLLM's names than as written.

    Args:
        aligned: the entry in vLLM's names.
        modules: see `head_modules`.
        may_be_idle: whether it may select none in either.
    Raises:
        ValueError: with the number of modules that it selects in both.
    """
    from vllm.model_executor.layers.quantization.utils.config_utils import is_equal_or_regex_match

    # A checkpoint's names may have `model.` in front: one that fits is meant, or left out.
    excludes = bool(EXCLUDES.search(target))
    fits = all if excludes else any
    meant = {
        vllm_name
        for name, vllm_name in modules.items()
        if fits(is_equal_or_regex_match(f"{model}mtp.{name}", target) for model in ("", "model."))
    }
    selected = {name for name in modules.values() if is_equal_or_regex_match(name, aligned)}
    if meant != selected or not (selected or may_be_idle or excludes):
        raise ValueError(
            f"quantization target {target!r}: selects {len(meant)} modules of the MTP head in the "
            f"checkpoint's names and, as {aligned!r}, {len(selected)} in vLLM's; must be the same "
            r"ones, at least one: name the head as `mtp\.0\.`, or remove the target"
        )


def use_vllm_names(quant_config: Any, config: Mapping[str, Any]) -> None:
    """Rewrite what a `CompressedTensorsConfig` says of the head in place; others are left alone.

    Args:
        config: config.json of the model.
    Raises:
        ValueError: see `align_target` and `check_target`; an ignore may concern no module.
    """
    targets = getattr(quant_config, "target_scheme_map", None)
    if targets is None:
        return
    layers = config["num_hidden_layers"], config["num_nextn_predict_layers"]
    modules = head_modules(config)
    for entries, may_be_idle in ((targets, False), (quant_config.ignore, True)):
        for target in entries:
            if "mtp" in target:
                check_target(target, align_target(target, *layers), modules, may_be_idle)
    align_mtp_targets(quant_config, *layers)
