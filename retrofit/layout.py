"""Names, shapes and dtypes of DeepSeek-V4 checkpoints, from config.json alone.

A weight is stored in one of three layouts:

| kind       | original                       | W4A16-FP8                                 | BF16 |
|------------|--------------------------------|-------------------------------------------|------|
| EXPERT     | weight I8, scale F8_E8M0       | weight_packed, weight_scale, weight_shape | BF16 |
| ATTENTION  | weight F8_E4M3, scale F8_E8M0  | weight F8_E4M3, weight_scale F32          | BF16 |
| PROJECTION | weight F8_E4M3, scale F8_E8M0  | BF16                                      | BF16 |
| BF16, F32, I64 | as they are                | as they are                               | same |

The MTP head is one decoder layer without compressor and indexer, plus its own norms, two
projections and an output mixer, under `mtp.0.`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kernels.formats import FP4_GROUP, FP8_BLOCK, INT4_GROUP
from retrofit.errors import BadInput
from retrofit.reading import Entry

CODES_PER_WORD = 8
SIZES = (
    "num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "head_dim",
    "q_lora_rank", "o_lora_rank", "o_groups", "index_n_heads", "index_head_dim",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "num_hash_layers", "hc_mult",
)  # fmt: skip
HEAD_PREFIX = "mtp.0."
HEAD_NAME = re.compile(r"(?:model\.)?mtp\.\d+\.")
# The engine shares these with the target when they are absent.
HEAD_ALIASES = ("mtp.0.head.weight", "mtp.0.emb.tok_emb.weight")


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


def check_sizes(config: Mapping[str, Any]) -> None:
    """Whether config.json has what the names and shapes follow from.

    Raises:
        BadInput: another model, a size that is absent or no positive number, a wrong number of
            compress_ratios, the DSpark variant, or a quantized width that is no multiple of 128.
    """
    if config.get("model_type") != "deepseek_v4":
        raise BadInput(
            f"config.json: model_type = {config.get('model_type')!r}; deepseek_v4 is needed"
        )
    for key in SIZES:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise BadInput(f"config.json: {key} = {value!r}; a number is needed")
    ratios = config.get("compress_ratios")
    if dspark := sorted(key for key in config if key.startswith("dspark_")):
        raise BadInput(
            f"config.json: {dspark[0]} is set: this is the DSpark variant, whose mtp.* tensors "
            "are no MTP head"
        )
    needed = config["num_hidden_layers"] + 1
    if not isinstance(ratios, list) or len(ratios) != needed:
        count = len(ratios) if isinstance(ratios, list) else "no"
        raise BadInput(
            f"config.json: {count} compress_ratios; num_hidden_layers + 1 (the MTP layer) = "
            f"{needed} are needed"
        )
    if ratios[-1] != 0:
        raise BadInput(f"config.json: compress_ratios ends in {ratios[-1]}; the MTP layer has 0")
    for key in ("hidden_size", "moe_intermediate_size", "q_lora_rank"):
        if config[key] == 0 or config[key] % INT4_GROUP:
            raise BadInput(
                f"config.json: {key} = {config[key]} is not a multiple of {INT4_GROUP}, the "
                "quantization group"
            )


def head_weights(config: Mapping[str, Any]) -> Iterator[Weight]:
    """Weights of the MTP head: 797 in Flash."""
    hidden = config["hidden_size"]
    for name in ("enorm", "hnorm", "norm"):
        yield Weight(f"{HEAD_PREFIX}{name}", Kind.BF16, (hidden,))
    for name in ("e_proj", "h_proj"):
        yield Weight(f"{HEAD_PREFIX}{name}", Kind.PROJECTION, (hidden, hidden))
    yield from _block(HEAD_PREFIX, config, ratio=0, hashed=False)
    yield from _hc_head(HEAD_PREFIX, config)


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


def base_forms(weight: Weight) -> tuple[tuple[Spec, ...], ...]:
    """Every form in which a W4A16 base may store a trunk weight; the first is ours.

    Published bases differ: what came through Transformers has the FP32 tensors in BF16 and the
    router's bias under another name; compressor and indexer are FP8 or BF16; FP8 scales of a
    model that was loaded in BF16 are BF16; some upcast the output head.
    """
    ours = tensors(weight, Layout.W4A16)
    if weight.kind == Kind.EXPERT:
        return (ours,)
    if weight.kind == Kind.ATTENTION:
        scale = Spec(ours[1].name, ("F32", "F8_E8M0", "BF16"), ours[1].shape)
        return ((ours[0], scale), tensors(weight, Layout.BF16))
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


def is_compressor(stem: str) -> bool:
    """Whether stock vLLM builds this module without quantization although bases store it FP8."""
    return re.search(r"compressor\.(wkv|wgate)$|indexer\.weights_proj$", stem) is not None


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
    for name in wanted.keys() & found.keys():
        faults += spec_faults(wanted[name], found[name])
    return faults


def compare_trunk(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> list[str]:
    """How the trunk in these tensors differs from a complete W4A16 base."""
    forms = (base_forms(weight) for weight in trunk_weights(config))
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
