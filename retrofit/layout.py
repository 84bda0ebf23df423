"""How the tensors of a checkpoint differ from the layouts of `kernels.weights`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kernels.weights import (
    INT4_GROUP,
    Kind,
    Layout,
    Spec,
    Weight,
    head_weights,
    is_compressor,
    tensors,
    trunk_weights,
)
from retrofit.errors import BadInput
from retrofit.reading import CONFIG, Entry
from retrofit.schemes import FP8, NONE, scheme_of_weight

SIZES = (
    "num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "head_dim",
    "q_lora_rank", "o_lora_rank", "o_groups", "index_n_heads", "index_head_dim",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "num_hash_layers", "hc_mult",
)  # fmt: skip
HEAD_NAME = re.compile(r"(?:model\.)?mtp\.\d+\.")
# Copies of the trunk's output head and embedding, which the engine shares when they are absent.
HEAD_ALIASES = ("mtp.0.head.weight", "mtp.0.emb.tok_emb.weight")


def check_sizes(config: Mapping[str, Any], where: Path = Path(CONFIG)) -> None:
    """Whether config.json, called `where` in messages, has what names and shapes follow from.

    Raises:
        BadInput: another model, a size that is absent or no positive number, compress_ratios that
            are no numbers or of a wrong count, the DSpark variant, or a quantized width that is no
            multiple of 128.
    """
    if config.get("model_type") != "deepseek_v4":
        raise BadInput(f"{where}: model_type = {config.get('model_type')!r}; deepseek_v4 is needed")
    for key in SIZES:
        value = config.get(key)
        if not _is_count(value) or (value == 0 and key != "num_hash_layers"):
            raise BadInput(f"{where}: {key} = {value!r}; a positive number is needed")
    ratios = config.get("compress_ratios")
    if dspark := sorted(key for key in config if key.startswith("dspark_")):
        raise BadInput(
            f"{where}: {dspark[0]} is set: this is the DSpark variant, whose mtp.* tensors "
            "are no MTP head"
        )
    needed = config["num_hidden_layers"] + 1
    if not isinstance(ratios, list) or len(ratios) != needed:
        count = len(ratios) if isinstance(ratios, list) else "no"
        raise BadInput(
            f"{where}: {count} compress_ratios; num_hidden_layers + 1 (the MTP layer) = "
            f"{needed} are needed"
        )
    if not all(map(_is_count, ratios)):
        raise BadInput(f"{where}: compress_ratios = {ratios}; numbers are needed")
    if ratios[-1] != 0:
        raise BadInput(f"{where}: compress_ratios ends in {ratios[-1]}; the MTP layer has 0")
    for key in ("hidden_size", "moe_intermediate_size", "q_lora_rank"):
        if config[key] % INT4_GROUP:
            raise BadInput(
                f"{where}: {key} = {config[key]} is not a multiple of {INT4_GROUP}, the "
                "quantization group"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def base_forms(config: Mapping[str, Any], weight: Weight) -> tuple[tuple[Spec, ...], ...]:
    """Every form in which a W4A16 base may store a trunk weight; the first is ours.

    Attention is FP8 where the targets say so and BF16 where they do not: an engine has no other
    parameter for it. Compressor and indexer are read in both forms whatever the targets say.

    Published bases differ: what came through Transformers has the FP32 tensors in BF16 and the
    router's bias under another name; compressor and indexer are FP8 or BF16; FP8 scales of a
    model that was loaded in BF16 are BF16; some upcast the output head.
    """
    ours = tensors(weight, Layout.W4A16)
    if weight.kind == Kind.EXPERT:
        return (ours,)
    if weight.kind == Kind.ATTENTION:
        scale = Spec(ours[1].name, ("F32", "F8_E8M0", "BF16"), ours[1].shape)
        forms = {FP8: (ours[0], scale), NONE: tensors(weight, Layout.BF16)}
        scheme = scheme_of_weight(config, weight)
        return (forms[scheme],) if scheme in forms else tuple(forms.values())
    if weight.kind == Kind.F32:
        dtypes = ("F32", "BF16")
        forms = [(Spec(weight.name, dtypes, weight.shape),)]
        if weight.name.endswith(".gate.bias"):
            other = weight.name.removesuffix("bias") + "e_score_correction_bias"
            forms.append((Spec(other, dtypes, weight.shape),))
        return tuple(forms)
    if weight.kind == Kind.I64:
        return ((Spec(weight.name, ("I64", "I32"), weight.shape),),)
    forms = [(Spec(weight.name, ("BF16", "F32"), weight.shape),)]
    if is_compressor(weight.stem):
        fp8 = tensors(Weight(weight.stem, Kind.ATTENTION, weight.shape), Layout.W4A16)
        scale = Spec(fp8[1].name, ("F32", "F8_E8M0", "BF16"), fp8[1].shape)
        forms.append((fp8[0], scale))
    return tuple(forms)


def head_tensors(config: Mapping[str, Any], layout: Layout) -> dict[str, Spec]:
    """Every tensor of the head: 1,575 original, 2,338 W4A16, 797 BF16 in Flash."""
    return {s.name: s for w in head_weights(config) for s in tensors(w, layout)}


def head_entries(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Tensors whose name belongs to the head, well spelled or not."""
    return {name: entry for name, entry in entries.items() if HEAD_NAME.match(name)}


def layer_of_head(config: Mapping[str, Any]) -> int:
    """The number under which vLLM builds the head."""
    return config["num_hidden_layers"]


def compare_head(
    config: Mapping[str, Any], entries: Mapping[str, Entry], layout: Layout
) -> list[str]:
    """How the head in these tensors differs from a complete one of that layout."""
    wanted = head_tensors(config, layout)
    found = head_entries(entries)
    number = layer_of_head(config)
    strays = [n for n in entries if re.match(rf"(?:model\.)?layers\.{number}\.", n)]
    faults = [f"{name}: is missing" for name in wanted if name not in found]
    faults += [
        f"{name}: is not expected{_hint(name, layout)}"
        for name in sorted(found.keys() - wanted.keys() - set(HEAD_ALIASES))
    ]
    faults += [
        f"{name}: is not expected; the head's names begin with `mtp.0.`, and names have no "
        "`model.` prefix"
        for name in sorted(strays)
    ]
    vocabulary = (config["vocab_size"], config["hidden_size"])
    wanted |= {name: Spec(name, ("BF16", "F32"), vocabulary) for name in HEAD_ALIASES}
    for name in wanted.keys() & found.keys():
        faults += spec_faults(wanted[name], found[name])
    return faults


def compare_trunk(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> list[str]:
    """How the trunk in these tensors differs from a complete W4A16 base."""
    forms = (base_forms(config, weight) for weight in trunk_weights(config))
    return _compare(forms, _trunk_entries(config, entries))


def compare_original_trunk(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> list[str]:
    """How the trunk in these tensors differs from a complete original."""
    forms = ((tensors(weight, Layout.ORIGINAL),) for weight in trunk_weights(config))
    return _compare(forms, _trunk_entries(config, entries))


def _trunk_entries(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    head = re.compile(rf"{HEAD_NAME.pattern}|(?:model\.)?layers\.{layer_of_head(config)}\.")
    return {name: entry for name, entry in entries.items() if not head.match(name)}


def _compare(
    wanted: Iterable[tuple[tuple[Spec, ...], ...]], found: Mapping[str, Entry]
) -> list[str]:
    faults, used = [], set()
    for forms in wanted:
        # The form with the fewest faults; among equals the one with more tensors.
        form = min(forms, key=lambda specs: (len(_form_faults(specs, found)), -len(specs)))
        used |= {spec.name for spec in form}
        faults += _form_faults(form, found)
    faults += [
        f"{name}: is not expected{_hint(name, Layout.W4A16)}"
        for name in sorted(found.keys() - used)
    ]
    return faults


def _form_faults(specs: tuple[Spec, ...], found: Mapping[str, Entry]) -> list[str]:
    faults = [f"{spec.name}: is missing" for spec in specs if spec.name not in found]
    for spec in specs:
        if spec.name in found:
            faults += spec_faults(spec, found[spec.name])
    return faults


def spec_faults(spec: Spec, entry: Entry) -> list[str]:
    """Wrong dtype or shape of one tensor."""
    faults = []
    if entry.dtype not in spec.dtypes:
        why = ""
        if entry.dtype == "U8" and "scale" in spec.name:
            why = "; exponents typed as numbers load as 119, 127, 130 without an error"
        faults.append(f"{spec.name}: dtype {entry.dtype}; must be {' or '.join(spec.dtypes)}{why}")
    if entry.shape != spec.shape:
        faults.append(f"{spec.name}: shape {list(entry.shape)}; must be {list(spec.shape)}")
    return faults


def _hint(name: str, layout: Layout) -> str:
    """Why a name is wrong, where that is known."""
    if name.startswith("model."):
        return "; names have no `model.` prefix"
    if name.endswith("_inv"):
        return "; the scale is called `weight_scale`"
    if name.endswith(".scale") and layout == Layout.W4A16:
        return "; the scale is called `weight_scale`"
    if re.search(r"(gate|up|down)_proj", name):
        return "; Transformers' expert names: w1, w3, w2 are read here"
    if re.match(r"mtp\.[1-9]", name):
        return "; one MTP layer is read here"
    if name.endswith(("weight_zero_point", "weight_g_idx")):
        return "; the format is symmetric and has no g_idx"
    return ""
