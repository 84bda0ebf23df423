"""What loads that look complete can lose: a reload's sinks, ids of no expert, targets on `mtp`."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.quantization.utils.config_utils import is_equal_or_regex_match
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from kernels.loading import LoadReport, Part, StrictLoader
from kernels.quant_targets import align_target, use_vllm_names
from serve.shapes import flash_config

SINK, NORM, IDS = (
    "layers.0.attn.attn_sink",
    "layers.0.attn_norm.weight",
    "layers.0.ffn.gate.tid2eid",
)


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class Attention(nn.Module):
    """Sinks as vLLM makes them: four heads of this rank and two of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_sink = parameter(torch.full((6,), -math.inf))


class DeferredAttention(Attention, AttentionLayerBase):
    """Attention that vLLM's reload fills last."""

    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config: Any) -> None:
        return None

    def process_weights_after_loading(self, dtype: torch.dtype) -> None:
        pass


def named(**modules: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in modules.items():
        setattr(module, name, child)
    return module


def leaf(name: str, tensor: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_parameter(name, parameter(tensor))
    return module


def model_of(**modules: nn.Module) -> nn.Module:
    """A target of one layer with these modules."""
    return named(model=named(layers=nn.ModuleList([named(**modules)])))


def load_sinks(model: nn.Module) -> LoadReport:
    """As rank 1 of 2."""
    loader = StrictLoader(model, Part.TARGET, num_experts=1, tp_rank=1, tp_size=2)
    return loader.load([(SINK, torch.arange(8.0)), (NORM, torch.arange(4.0) + 10)])


@pytest.mark.parametrize("attention", [Attention, DeferredAttention])
def test_a_reload_sets_the_sinks_that_it_reports(attention):
    """vLLM's own layerwise reload: `reload_weights`, and waking from sleep level 2."""
    model = model_of(attn=attention(), attn_norm=leaf("weight", torch.empty(4)))
    record_metadata_for_reloading(model)
    first = load_sinks(model).parameters
    kept = dict(model.named_parameters())
    with torch.no_grad():
        for lost in model.parameters():  # what the sleep leaves
            lost.zero_()
    initialize_layerwise_reload(model)
    again = load_sinks(model).parameters
    finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))
    filled = {name.removeprefix("model."): p.tolist() for name, p in model.named_parameters()}
    assert first == again == {f"model.{SINK}", f"model.{NORM}"}
    assert filled == {SINK: [4.0, 5.0, 6.0, 7.0, -math.inf, -math.inf], NORM: [10, 11, 12, 13]}
    assert all(kept[name] is p for name, p in model.named_parameters())  # what graphs point at


def test_a_parameter_without_memory_that_no_reload_holds_is_refused():
    model = model_of(attn=Attention(), attn_norm=leaf("weight", torch.empty(4, device="meta")))
    with pytest.raises(RuntimeError, match=rf"1 parameters are on meta .*: model\.{NORM}$"):
        load_sinks(model)


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 8, torch.int64), (-1, 7, torch.int64), (0, 383, torch.int32)],
)
def test_ids_of_no_expert_are_refused(low, high, dtype):
    model = model_of(ffn=named(gate=leaf("tid2eid", torch.zeros(4, 2, dtype=torch.int32))))
    ids = torch.tensor([[0, 7], [low, high], [1, 2], [3, 4]], dtype=dtype)
    with pytest.raises(
        ValueError,
        match=rf"1 with wrong values: {IDS} \(ids {low} to {high}, must be 0 to 7\)$",
    ):
        StrictLoader(model, Part.TARGET, num_experts=8).load([(IDS, ids)])


def test_ids_of_the_first_and_the_last_expert_are_loaded():
    model = model_of(ffn=named(gate=leaf("tid2eid", torch.zeros(1, 2, dtype=torch.int32))))
    StrictLoader(model, Part.TARGET, num_experts=8).load([(IDS, torch.tensor([[7, 0]]))])
    assert model.get_parameter(f"model.{IDS}").tolist() == [[7, 0]]


LAYER = "model.layers.43."


@pytest.mark.parametrize(
    ("target", "module"),
    [
        (r"re:mtp\..*", "attn.wq_b"),
        (r"re:^mtp\.0\..*", "ffn.experts.3.w1"),
        (r"re:^mtp\.[0-9]+\.attn\.wq_b$", "attn.wq_b"),
        (r"re:^(mtp\.0|layers\.\d+)\.attn\.wq_b$", "attn.wq_b"),
        (r"re:(layers\.1|mtp\.0)\.e_proj", "e_proj"),
        (r"re:^(?:model\.)?mtp\.0\.e_proj$", "e_proj"),
        ("re:mtp.*", "e_proj"),
        ("re:.*mtp.*wq_a$", "attn.wq_a"),
        (r"re:.*mtp\.0.*w1$", "ffn.shared_experts.w1"),
        (r"re:.*\.mtp\.\d+\.ffn.*", "ffn.experts.0.w2"),
    ],
)
def test_a_regex_on_mtp_matches_the_head_s_module_and_no_other_layer_s(target, module):
    """With vLLM's own matcher, which begins at the first letter of its names."""
    aligned = align_target(target, 43, 1)
    assert is_equal_or_regex_match(LAYER + module, aligned)
    assert not is_equal_or_regex_match(f"model.layers.4.{module}", aligned)


@pytest.mark.parametrize(
    "target", [r"re:^(?!mtp\.).*experts", r"re:(?!.*mtp\.).*experts", "re:^(?!.*mtp).*experts"]
)
def test_a_regex_for_all_but_the_head_leaves_it_out(target):
    aligned = align_target(target, 43, 1)
    assert is_equal_or_regex_match("model.layers.4.ffn.experts.0.w1", aligned)
    assert not is_equal_or_regex_match(f"{LAYER}ffn.experts.0.w1", aligned)


def quantization(targets: list[str], ignore: list[str]) -> SimpleNamespace:
    return SimpleNamespace(target_scheme_map=dict.fromkeys(targets, "fp8"), ignore=ignore)


@pytest.mark.parametrize(
    ("target", "counts"),
    [
        ("re:.*mtp[.]0[.]ffn[.]experts.*w1$", (256, 0)),
        (r"re:mtp\.(0)\.e_proj", (1, 0)),
        ("re:^(?!mtp[.]).*wq_b$", (0, 1)),
    ],
)
@pytest.mark.parametrize("as_ignore", [False, True])
def test_an_entry_that_selects_other_modules_in_vllm_s_names_is_refused(target, counts, as_ignore):
    config = quantization([] if as_ignore else [target], [target] if as_ignore else [])
    meant, selected = counts
    with pytest.raises(ValueError, match=f"selects {meant} modules .*, {selected} in vLLM's") as no:
        use_vllm_names(config, flash_config())
    assert repr(target) in str(no.value)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("target", [r"re:mtp\.0\.atn\..*", "mtp.0.attn.wq_x", "mtp.1.e_proj"])
def test_a_target_that_selects_no_module_of_the_head_is_refused_and_an_ignore_is_idle(target):
    use_vllm_names(quantization([], [target]), flash_config())
    with pytest.raises(ValueError, match="selects 0 modules .*, 0 in vLLM's; .* at least one"):
        use_vllm_names(quantization([target], []), flash_config())


def test_what_vllm_can_match_is_rewritten_and_the_rest_is_kept():
    """Names of fused modules, and those to which vLLM renamed an entry before, are modules too."""
    config = quantization(
        [
            r"re:mtp\.0\.attn\.fused_wqa_wkv",
            "model.mtp.0.ffn.shared_experts.down_proj",
            r"re:.*(mtp|layers)\.\d+\.attn\.wq_b",
            r"re:(?!.*mtp\.).*experts",
            "Linear",
        ],
        ["mtp.0.head", r"re:.*mtp\..*indexer.*"],
    )
    for _ in range(2):  # a second time changes nothing
        use_vllm_names(config, flash_config())
        assert list(config.target_scheme_map) == [
            r"re:(?:model\.)?layers\.43\.attn\.fused_wqa_wkv",
            f"{LAYER}ffn.shared_experts.down_proj",
            r"re:.*(mtp|layers)\.\d+\.attn\.wq_b",
            r"re:(?!.*layers\.43\.).*experts",
            "Linear",
        ]
        assert config.ignore == [f"{LAYER}head", r"re:.*layers\.43\..*indexer.*"]
    use_vllm_names(SimpleNamespace(weight_block_size=[128, 128]), flash_config())
    use_vllm_names(None, flash_config())
