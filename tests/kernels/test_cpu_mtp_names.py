"""Checkpoint names of the MTP head and the parameters that they fill."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from kernels.cpu.mtp import MtpWeightLoader

pytestmark = pytest.mark.engine

BLOCK = "model.layers.4.mtp_block."
SHARED = f"{BLOCK}ffn.shared_experts."
EXPERTS = f"{BLOCK}ffn.experts.routed_experts."
PARAMETERS = [
    "model.layers.4.enorm.weight",
    "model.layers.4.e_proj.weight",
    "model.layers.4.e_proj.weight_scale_inv",
    "model.layers.4.hc_head_fn",
    "model.layers.4.shared_head.norm.weight",
    "model.layers.4.shared_head.head.weight",
    "model.embed_tokens.weight",
    f"{BLOCK}attn_norm.weight",
    f"{BLOCK}attn.fused_wqa_wkv.weight",
    f"{BLOCK}attn.fused_wqa_wkv.weight_scale_inv",
    f"{BLOCK}attn.wo_a.weight_scale",
    f"{BLOCK}attn.attn_sink",
    f"{BLOCK}ffn.gate.e_score_correction_bias",
    f"{SHARED}gate_up_proj.weight",
    f"{SHARED}down_proj.weight",
    f"{EXPERTS}w13_weight",
    f"{EXPERTS}w13_weight_scale",
    f"{EXPERTS}w2_weight",
    f"{EXPERTS}w2_weight_scale",
]


@pytest.fixture
def loader():
    parameters = [(name, torch.nn.Parameter(torch.zeros(1))) for name in PARAMETERS]
    return MtpWeightLoader(
        SimpleNamespace(
            model=SimpleNamespace(first_layer=4, num_layers=1),
            config=SimpleNamespace(n_routed_experts=2),
            named_parameters=lambda: parameters,
        )
    )


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("enorm.weight", ("model.layers.4.enorm.weight", None, None)),
        ("e_proj.scale", ("model.layers.4.e_proj.weight_scale_inv", None, None)),
        ("e_proj.weight_scale", ("model.layers.4.e_proj.weight_scale_inv", None, None)),
        ("hc_head_fn", ("model.layers.4.hc_head_fn", None, None)),
        ("norm.weight", ("model.layers.4.shared_head.norm.weight", None, None)),
        ("head.weight", ("model.layers.4.shared_head.head.weight", None, None)),
        ("emb.tok_emb.weight", ("model.embed_tokens.weight", None, None)),
        ("attn_norm.weight", (f"{BLOCK}attn_norm.weight", None, None)),
        ("attn.wq_a.weight", (f"{BLOCK}attn.fused_wqa_wkv.weight", 0, None)),
        ("attn.wkv.scale", (f"{BLOCK}attn.fused_wqa_wkv.weight_scale_inv", 1, None)),
        ("attn.wo_a.scale", (f"{BLOCK}attn.wo_a.weight_scale", None, None)),
        ("attn.attn_sink", (f"{BLOCK}attn.attn_sink", None, None)),
        ("ffn.gate.bias", (f"{BLOCK}ffn.gate.e_score_correction_bias", None, None)),
        ("ffn.shared_experts.w3.weight", (f"{SHARED}gate_up_proj.weight", 1, None)),
        ("ffn.shared_experts.w2.weight", (f"{SHARED}down_proj.weight", None, None)),
        ("ffn.experts.1.w3.weight", (f"{EXPERTS}w13_weight", "w3", 1)),
        ("ffn.experts.0.w2.scale", (f"{EXPERTS}w2_weight_scale", "w2", 0)),
        ("ffn.experts.2.w2.scale", None),  # two experts only
        ("ffn.experts.0.gate_proj.weight", None),  # contains "e_proj", and is no layer-level name
        ("ffn.experts.0.w1.weight_packed", None),
        ("attn.unheard_of.weight", None),
    ],
)  # fmt: skip
def test_name(loader, name, unit):
    assert loader._unit(0, name) == unit


def test_what_is_missing_and_what_does_not_fit_is_named_and_counted(loader):
    with pytest.raises(ValueError, match=r"load of the MTP head: \d+ not filled: .*; 1 unexpected"):
        loader.load([("layers.0.attn.wkv.weight", torch.zeros(1)), ("mtp.0.x", torch.zeros(1))])


def test_the_units_are_counted_per_expert_projection_and_leaf(loader):
    units = loader._units()
    assert sum(name.startswith(EXPERTS) for name, _, _ in units) == 2 * 3 * 2
    assert (f"{BLOCK}attn.fused_wqa_wkv.weight", 1, None) in units
    # Shared with the target after loading.
    assert not any("embed_tokens" in name or "shared_head.head" in name for name, _, _ in units)


def test_e8m0_bytes_are_kept_where_the_parameter_holds_bytes(loader):
    scale = torch.tensor([2.0**-7]).to(torch.float8_e8m0fnu)
    name = f"{BLOCK}attn.wo_a.weight_scale"
    loader.parameters[name] = torch.nn.Parameter(
        torch.zeros(1, dtype=torch.uint8), requires_grad=False
    )
    loader._fill((name, None, None), scale)
    assert loader.parameters[name].item() == 120
