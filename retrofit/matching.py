"""Which quantization scheme a compressed-tensors config gives each module of the MTP head.

vLLM builds the head as layer `num_hidden_layers`, so that is the name to match: a target on `mtp`
matches nothing, and targets anchored to other names or to a range of layers lose the head.
"""

from __future__ import annotations

import ast
import copy
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kernels.weights import EXPERT_DTYPE, trunk_weights
from retrofit.layout import layer_of_head
from retrofit.reading import CONFIG
from retrofit.schemes import ALLOWED, FP8, INT4, NONE, PACKED, scheme_of, scheme_of_weight

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
# Type of a group's weights -> the only format that vLLM has a method for.
FORMATS = {"float": "float-quantized", "int": "pack-quantized"}
# Keys besides the sizes that vLLM's config class fills with another model's value, without an
# error, when they are absent.
NEEDED = (
    "architectures", "compress_rope_theta", "hc_eps", "hc_sinkhorn_iters", "index_topk",
    "max_position_embeddings", "norm_topk_prob", "num_key_value_heads", "qk_rope_head_dim",
    "rms_norm_eps", "rope_scaling", "rope_theta", "routed_scaling_factor", "scoring_func",
    "sliding_window", "swiglu_limit",
)  # fmt: skip
VLLM_VERSION = "0.32.0"
# What vLLM's reading of a quantization_config ends with, as it is written there.
REFUSALS = (
    AssertionError, AttributeError, KeyError, NotImplementedError, TypeError, ValueError,
)  # fmt: skip


def config_faults(config: Mapping[str, Any]) -> list[str]:
    """What in config.json keeps an engine from loading a W4A16-FP8 checkpoint with its head."""
    faults = [
        f"config.json: {key} is missing: the engine would take a value of its own"
        for key in NEEDED
        if config.get(key) is None
    ]
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
    kind = weights.get("type")
    if not isinstance(kind, str) or kind not in FORMATS:
        return [f"{where}: type = {kind!r}; float or int"]
    if group.get("format") != FORMATS[kind]:
        faults.append(
            f"{where} has format = {group.get('format')!r}; each group needs its own, and that of "
            f"{kind} weights is {FORMATS[kind]}"
        )
    if weights.get("actorder") in ("group", "dynamic"):
        faults.append(f"{where}: actorder = {weights['actorder']!r} is refused by vLLM; static")
    inputs = group.get("input_activations")
    faults += (_int4_faults if kind == "int" else _fp8_faults)(where, weights, inputs)
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


def _int4_faults(where: str, weights: Mapping[str, Any], inputs: Any) -> list[str]:
    faults = []
    if (weights.get("num_bits"), weights.get("group_size")) != (4, 128) or (
        weights.get("symmetric") is not True
    ):
        faults.append(
            f"{where}: num_bits = {weights.get('num_bits')}, group_size = "
            f"{weights.get('group_size')}, symmetric = {weights.get('symmetric')}; "
            "4, 128 and true are what the head has"
        )
    if inputs is not None:
        faults.append(f"{where}: input_activations = {inputs!r}; W4A16 has none")
    return faults


def _fp8_faults(where: str, weights: Mapping[str, Any], inputs: Any) -> list[str]:
    faults = []
    if weights.get("num_bits") != 8 or weights.get("block_structure") != [128, 128]:
        faults.append(
            f"{where}: num_bits = {weights.get('num_bits')}, block_structure = "
            f"{weights.get('block_structure')}; 8 and [128, 128] are what the head has"
        )
    keys = ("num_bits", "type", "dynamic")
    found = [inputs.get(key) for key in keys] if isinstance(inputs, dict) else None
    if found != [8, "float", True]:
        faults.append(
            f"{where}: input_activations = {inputs!r}; num_bits 8, type float and dynamic are what "
            "FP8 blocks are multiplied with"
        )
    return faults


def static_faults(config: Mapping[str, Any]) -> list[str]:
    """Modules that the targets, read as vLLM reads them, give another scheme than they are for."""
    quantization = config["quantization_config"]
    found = {
        module: scheme_of(quantization, f"model.layers.{layer_of_head(config)}.{module}")
        for module in INTENDED
    }
    return _compare(found, "config.json") + _trunk_faults(config)


def _trunk_faults(config: Mapping[str, Any]) -> list[str]:
    wrong: dict[tuple[str, str], list[str]] = {}
    for weight in trunk_weights(config):
        allowed = ALLOWED.get(weight.kind)
        scheme = scheme_of_weight(config, weight)
        if allowed and scheme not in allowed:
            wrong.setdefault((str(scheme), " or ".join(allowed)), []).append(weight.stem)
    return [
        f"config.json: the targets give {len(stems)} modules such as {stems[0]} {found!r}; "
        f"{wanted!r} is what their tensors are made for"
        for (found, wanted), stems in wrong.items()
    ]


def _compare(found: Mapping[str, str], who: str) -> list[str]:
    return [
        f"{who}: the targets give {module} of the head {found[module]!r}; {wanted!r} is what its "
        "tensors are made for"
        for module, wanted in INTENDED.items()
        if found[module] != wanted
    ]


def why_vllm_is_not_asked() -> str | None:
    """Why the installed vLLM cannot answer; None where it can."""
    try:
        import vllm
    except ImportError:
        return "vllm not installed"
    if vllm.__version__.split("+")[0] != VLLM_VERSION:
        return f"vllm {vllm.__version__} is installed; its answer is known of {VLLM_VERSION}"
    return None


def vllm_faults(config: Mapping[str, Any]) -> list[str] | None:
    """What the installed vLLM refuses in the config, and the schemes it reads; None without it."""
    if why_vllm_is_not_asked():
        return None
    with _quiet():
        return _vllm_config_faults(config) + _vllm_scheme_faults(config)


def _vllm_config_faults(config: Mapping[str, Any]) -> list[str]:
    import vllm
    from vllm.transformers_utils.config import get_config

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        try:
            get_config(folder, trust_remote_code=False)
        except Exception as error:  # noqa: BLE001 - whatever it is, a server would end with it
            return [f"vLLM {vllm.__version__} refuses config.json: {_one_line(error)}"]
    return []


def _vllm_scheme_faults(config: Mapping[str, Any]) -> list[str]:
    import vllm
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors as ct,
    )

    try:
        quantization = ct.CompressedTensorsConfig.from_config(
            copy.deepcopy(dict(config["quantization_config"]))
        )
        quantization.apply_vllm_mapper(_nvidia_mapper(Path(vllm.__path__[0])))
        quantization.packed_modules_mapping = PACKED
        layer = layer_of_head(config)
        found = {module: _vllm_scheme(quantization, layer, module) for module in INTENDED}
    except REFUSALS as error:
        return [f"vLLM {vllm.__version__} refuses quantization_config: {_one_line(error)}"]
    return _compare(found, f"vLLM {vllm.__version__}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without vLLM's remarks: what ends in a fault is said once."""
    logger = logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _one_line(error: Exception) -> str:
    """pydantic takes several lines, the last an address; an assertion may have no text at all."""
    text = " ".join(str(error).split("For further information")[0].split())
    return text or type(error).__name__


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
