"""Which quantization scheme a compressed-tensors config gives each module of the MTP head.

vLLM builds the head as layer `num_hidden_layers`, so that is the name to match: a target on `mtp`
matches nothing, and targets anchored to other names or to a range of layers lose the head.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.weights import EXPERT_DTYPE
from retrofit.layout import layer_of_head

FP8, INT4, NONE = "float8 block", "int4 group", "none"
PACKED = {
    "gate_up_proj": ["w1", "w3"],
    "fused_wqa_wkv": ["wq_a", "wkv"],
    "fused_wkv_wgate": ["wkv", "wgate"],
}
# Module below the head's layer -> scheme that the head's tensors are made for.
INTENDED = {
    "attn.fused_wqa_wkv": FP8,
    "attn.wq_b": FP8,
    "attn.wo_a": FP8,
    "attn.wo_b": FP8,
    "ffn.experts.0.w1": INT4,
    "ffn.experts.0.w2": INT4,
    "ffn.experts.0.w3": INT4,
    "ffn.shared_experts.gate_up_proj": NONE,
    "ffn.shared_experts.down_proj": NONE,
    "e_proj": NONE,
    "h_proj": NONE,
}
FORMATS = ("float-quantized", "pack-quantized")


def config_faults(config: Mapping[str, Any]) -> list[str]:
    """What in config.json keeps an engine from loading a W4A16-FP8 checkpoint with its head."""
    faults = []
    if config.get("topk_method") != "noaux_tc":
        faults.append(
            f"config.json: topk_method = {config.get('topk_method')!r}; 'noaux_tc' must be there "
            "literally, or the router's bias has no parameter"
        )
    if config.get("num_nextn_predict_layers") != 1:
        faults.append(
            f"config.json: num_nextn_predict_layers = {config.get('num_nextn_predict_layers')!r}; "
            "1 is needed"
        )
    if config.get("expert_dtype", "fp4") == "fp4":
        faults.append(
            f"config.json: expert_dtype = {config.get('expert_dtype')!r}: vLLM takes the experts "
            f"for FP4; {EXPERT_DTYPE!r} is what they are"
        )
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return [*faults, "config.json: quantization_config is missing"]
    if quantization.get("quant_method") != "compressed-tensors":
        faults.append(
            f"config.json: quant_method = {quantization.get('quant_method')!r}; "
            "'compressed-tensors' is needed"
        )
        return faults
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return [*faults, "config.json: quantization_config has no config_groups"]
    for name, group in groups.items():
        faults += _group_faults(name, group)
    if not faults:
        faults += static_faults(config)
    return faults


def _group_faults(name: str, group: Any) -> list[str]:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        return [f"config.json: config group {name!r} has no weights"]
    faults = []
    weights, where = group["weights"], f"config.json: config group {name!r}"
    if group.get("format") not in FORMATS:
        faults.append(
            f"{where} has format = {group.get('format')!r}; each group needs its own, "
            f"{' or '.join(FORMATS)}"
        )
    if weights.get("actorder") in ("group", "dynamic"):
        faults.append(f"{where}: actorder = {weights['actorder']!r} is refused by vLLM; static")
    if weights.get("type") == "int" and (
        (weights.get("num_bits"), weights.get("group_size")) != (4, 128)
        or weights.get("symmetric") is not True
    ):
        faults.append(
            f"{where}: num_bits = {weights.get('num_bits')}, group_size = "
            f"{weights.get('group_size')}, symmetric = {weights.get('symmetric')}; "
            "4, 128 and true are what the head has"
        )
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        return [*faults, f"{where} has no list of targets"]
    for target in targets:
        if re.match(r"(?:re:)?\W*(?:model\W+)?mtp\W", target):
            faults.append(
                f"{where}: target {target!r} never matches: vLLM builds the head under "
                "`model.layers.N`, not `mtp`"
            )
        if target.startswith("re:"):
            try:
                re.compile(target[3:])
            except re.error as error:
                faults.append(f"{where}: target {target!r} is no regular expression: {error}")
    return faults


def static_faults(config: Mapping[str, Any]) -> list[str]:
    """Modules of the head that the targets, read as vLLM reads them, do not give their scheme."""
    quantization = config["quantization_config"]
    found = {
        module: _static_scheme(quantization, f"model.layers.{layer_of_head(config)}.{module}")
        for module in INTENDED
    }
    return _compare(found, "config.json")


def _static_scheme(quantization: Mapping[str, Any], name: str) -> str:
    def matches(target: str, module: str) -> bool:
        if target.startswith("re:"):
            return re.match(target[3:], module) is not None
        return target in (module, "Linear")

    parent, _, last = name.rpartition(".")
    names = [name, *(f"{parent}.{part}" for part in PACKED.get(last, ()))]
    if any(matches(t, n) for t in quantization.get("ignore") or () for n in names):
        return NONE
    for group in quantization["config_groups"].values():
        if any(matches(t, name) for t in group["targets"]) or all(
            any(matches(t, n) for t in group["targets"]) for n in names[1:] or [name]
        ):
            return _scheme_name(group["weights"])
    return NONE


def _scheme_name(weights: Mapping[str, Any]) -> str:
    kind = f"{weights.get('type')}{weights.get('num_bits')} {weights.get('strategy')}"
    return kind


def _compare(found: Mapping[str, str], who: str) -> list[str]:
    return [
        f"{who}: the targets give {module} of the head {found[module]!r}; {wanted!r} is what its "
        "tensors are made for"
        for module, wanted in INTENDED.items()
        if found[module] != wanted
    ]


def vllm_faults(config: Mapping[str, Any]) -> list[str] | None:
    """The same question, answered by the installed vLLM; None where there is none."""
    try:
        import vllm
        from vllm.model_executor.layers.quantization.compressed_tensors import (
            compressed_tensors as ct,
        )
    except ImportError:
        return None
    level = logging.getLogger("vllm").level
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        quantization = ct.CompressedTensorsConfig.from_config(dict(config["quantization_config"]))
        quantization.apply_vllm_mapper(_nvidia_mapper(Path(vllm.__path__[0])))
        quantization.packed_modules_mapping = PACKED
        layer = layer_of_head(config)
        found = {module: _vllm_scheme(quantization, layer, module) for module in INTENDED}
    except (ValueError, KeyError, NotImplementedError) as error:
        return [f"vLLM {vllm.__version__} refuses quantization_config: {error}"]
    finally:
        logging.getLogger("vllm").setLevel(level)
    return _compare(found, f"vLLM {vllm.__version__}")


class _Linear:
    """Stands for a linear layer: matching looks at the class's name."""


class _RoutedExperts:
    """Stands for the routed experts."""


_Linear.__name__, _RoutedExperts.__name__ = "Linear", "RoutedExperts"


def _vllm_scheme(quantization: Any, layer: int, module: str) -> str:
    experts = module.startswith("ffn.experts.")
    if experts:
        quantization._add_fused_moe_to_target_scheme_map()
    found = quantization.get_scheme_dict(
        _RoutedExperts() if experts else _Linear(), f"model.layers.{layer}.{module}"
    )
    if found is None:
        return NONE
    weights = found["weights"]
    parts = (getattr(value, "value", value) for value in (weights.type, weights.strategy))
    kind, strategy = parts
    return f"{kind}{weights.num_bits} {strategy}"


def _nvidia_mapper(folder: Path) -> Any:
    """The name mapper of the NVIDIA model, without importing that module, which needs CUDA."""
    import regex
    from vllm.model_executor.models.utils import WeightsMapper

    source = (folder / "models/deepseek_v4/nvidia/model.py").read_text(encoding="utf-8")
    name = "_make_deepseek_v4_weights_mapper"
    function = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    names: dict[str, Any] = {"re": regex, "WeightsMapper": WeightsMapper}
    exec(compile(ast.Module([function], []), name, "exec"), names)
    mapper = names[name]("fp4")
    if hasattr(mapper, "get_rename_mapper"):
        return mapper.get_rename_mapper()
    return mapper.get_unstacked_mapper()
