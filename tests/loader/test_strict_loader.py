"""Checkpoint names and the parameters that they fill, without an engine's model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kernels.formats import quantize_fp8_block
from kernels.full_sizes import FullSizes
from kernels.loading import Part, StrictLoader, Unit, as_stored, canonical_name, is_mtp_name
from kernels.loading_vllm import int4_group_size
from serve.shapes import checkpoint_tensors, flash_config

BLOCK = "model.layers.4.mtp_block."
EXPERTS = f"{BLOCK}ffn.experts.routed_experts."
DRAFT = [
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
    f"{BLOCK}ffn.shared_experts.gate_up_proj.weight",
    f"{BLOCK}ffn.shared_experts.down_proj.weight",
    f"{EXPERTS}w13_weight",
    f"{EXPERTS}w13_weight_scale",
    f"{EXPERTS}w2_weight",
    f"{EXPERTS}w2_weight_scale",
]
TARGET = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.hc_head_base",
    "model.layers.1.attn.compressor.fused_wkv_wgate.weight",
    "model.layers.1.attn.indexer.compressor.fused_wkv_wgate.weight",
    "model.layers.1.attn.indexer.weights_proj.weight",
    "model.layers.1.hc_attn_fn",
]


class Model(nn.Module):
    """Parameters under dotted names, each of shape (1,) unless given."""

    def __init__(self, names: list[str], **tensors: torch.Tensor) -> None:
        super().__init__()
        self.named = {
            name: nn.Parameter(tensors.get(name, torch.zeros(1)), requires_grad=False)
            for name in names
        }

    def named_parameters(self, *args, **kwargs):
        return iter(self.named.items())


def draft(names: list[str] = DRAFT, **tensors: torch.Tensor) -> StrictLoader:
    return StrictLoader(Model(names, **tensors), Part.DRAFT, num_experts=2, first_layer=4)


def target(names: list[str] = TARGET, **tensors: torch.Tensor) -> StrictLoader:
    return StrictLoader(Model(names, **tensors), Part.TARGET, num_experts=2)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("mtp.0.enorm.weight", Unit("model.layers.4.enorm.weight")),
        ("mtp.0.e_proj.scale", Unit("model.layers.4.e_proj.weight_scale_inv")),
        ("mtp.0.e_proj.weight_scale", Unit("model.layers.4.e_proj.weight_scale_inv")),
        ("model.mtp.0.hc_head_fn", Unit("model.layers.4.hc_head_fn")),
        ("mtp.0.norm.weight", Unit("model.layers.4.shared_head.norm.weight")),
        ("mtp.0.head.weight", Unit("model.layers.4.shared_head.head.weight")),
        ("mtp.0.emb.tok_emb.weight", Unit("model.embed_tokens.weight")),
        ("mtp.0.attn_norm.weight", Unit(f"{BLOCK}attn_norm.weight")),
        ("mtp.0.attn.wq_a.weight", Unit(f"{BLOCK}attn.fused_wqa_wkv.weight", 0)),
        ("mtp.0.attn.wkv.scale", Unit(f"{BLOCK}attn.fused_wqa_wkv.weight_scale_inv", 1)),
        ("mtp.0.attn.wo_a.weight_scale_inv", Unit(f"{BLOCK}attn.wo_a.weight_scale")),
        ("mtp.0.attn.attn_sink", Unit(f"{BLOCK}attn.attn_sink")),
        ("mtp.0.ffn.gate.bias", Unit(f"{BLOCK}ffn.gate.e_score_correction_bias")),
        (
            "mtp.0.ffn.shared_experts.w3.weight",
            Unit(f"{BLOCK}ffn.shared_experts.gate_up_proj.weight", 1),
        ),
        (
            "mtp.0.ffn.shared_experts.w2.weight",
            Unit(f"{BLOCK}ffn.shared_experts.down_proj.weight"),
        ),
        ("mtp.0.ffn.experts.1.w3.weight", Unit(f"{EXPERTS}w13_weight", "w3", 1)),
        ("mtp.0.ffn.experts.0.w2.scale", Unit(f"{EXPERTS}w2_weight_scale", "w2", 0)),
        ("mtp.0.ffn.experts.2.w2.scale", None),  # two experts only
        ("mtp.0.ffn.experts.0.gate_proj.weight", None),  # contains "e_proj"
        ("mtp.0.ffn.experts.0.w1.weight_packed", None),
        ("mtp.1.enorm.weight", None),  # one layer only
        ("mtp.0.attn.unheard_of.weight", None),
    ],
)  # fmt: skip
def test_a_name_of_the_head_fills_one_unit(name, unit):
    assert draft().expected.get(canonical_name(name)) == unit


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("head.weight", Unit("lm_head.weight")),
        ("embed.weight", Unit("model.embed_tokens.weight")),
        ("model.norm.weight", Unit("model.norm.weight")),
        ("hc_head_base", Unit("model.hc_head_base")),
        ("layers.1.hc_attn_fn", Unit("model.layers.1.hc_attn_fn")),
        (
            "layers.1.attn.indexer.compressor.wgate.weight",
            Unit("model.layers.1.attn.indexer.compressor.fused_wkv_wgate.weight", 1),
        ),
        ("layers.1.attn.compressor.fused_wkv_wgate.weight", None),
        ("mtp.0.norm.weight", None),
    ],
)
def test_a_name_of_the_target_fills_one_unit(name, unit):
    assert target().expected.get(canonical_name(name)) == unit


def test_units_are_counted_per_expert_projection_and_leaf():
    names = [name for name in draft().expected if ".experts." in name]
    assert len(names) == 2 * 3 * 2


@pytest.mark.parametrize(
    ("name", "is_mtp"),
    [("mtp.0.x", True), ("model.mtp.3.x", True), ("layers.0.mtp.x", False), ("mtpx.0.y", False)],
)
def test_names_of_the_head_start_with_mtp(name, is_mtp):
    assert is_mtp_name(name) is is_mtp


def test_what_the_head_shares_with_the_target_may_be_absent():
    names = ["model.layers.4.enorm.weight", "model.layers.4.shared_head.head.weight"]
    report = draft(names).load([("mtp.0.enorm.weight", torch.ones(1))])
    assert report.parameters == {"model.layers.4.enorm.weight"}


def test_the_other_part_is_skipped():
    loader = draft(["model.layers.4.enorm.weight"])
    report = loader.load(
        [("layers.0.attn.nonsense", torch.ones(1)), ("mtp.0.enorm.weight", torch.ones(1))]
    )
    assert report.num_tensors == 1


@pytest.mark.parametrize("first", ["weight", "weight_scale"])
def test_fp8_weights_of_a_bf16_module_are_dequantized_whichever_half_comes_first(first):
    name = "model.layers.1.attn.indexer.weights_proj.weight"
    loader = target([name], **{name: torch.zeros(64, 256, dtype=torch.bfloat16)})
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    data, scale = quantize_fp8_block(weight, torch.float32)
    halves = {"weight": data, "weight_scale": scale}
    order = sorted(halves, key=lambda leaf: leaf != first)
    prefix = "layers.1.attn.indexer.weights_proj."
    report = loader.load([(prefix + leaf, halves[leaf]) for leaf in order])
    assert report.dequantized == [prefix.removesuffix(".")]
    error = (loader.parameters[name].float() - weight).abs().max()
    assert error < 0.04 * weight.abs().max()  # half an e4m3 step, 2**-4, and BF16's rounding


def test_fp8_without_its_scale_is_missing_it():
    name = "model.layers.1.attn.indexer.weights_proj.weight"
    loader = target([name], **{name: torch.zeros(64, 128, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match=r"1 missing: \S+weights_proj.weight_scale$"):
        loader.load(
            [(name.removeprefix("model."), torch.zeros(64, 128, dtype=torch.float8_e4m3fn))]
        )


def test_a_half_of_an_fp8_weight_that_is_given_twice_is_refused():
    name = "model.layers.1.attn.indexer.weights_proj.weight"
    loader = target([name], **{name: torch.zeros(64, 128, dtype=torch.bfloat16)})
    data, scale = quantize_fp8_block(torch.ones(64, 128), torch.float32)
    prefix = "layers.1.attn.indexer.weights_proj."
    halves = [(f"{prefix}scale", 2 * scale), (f"{prefix}weight_scale", scale)]
    with pytest.raises(ValueError, match=r"1 given twice: \S+weights_proj.weight_scale$"):
        loader.load([*halves, (f"{prefix}weight", data)])


def test_two_parameters_that_one_tensor_would_fill_are_refused():
    names = [f"model.layers.1.ffn.gate.{leaf}" for leaf in ("bias", "e_score_correction_bias")]
    with pytest.raises(RuntimeError, match=r"gate\.\w+ would fill .*and.*"):
        target(names)


def test_a_scale_beside_a_bf16_weight_is_unexpected():
    name = "model.layers.1.attn.indexer.weights_proj.weight"
    loader = target([name], **{name: torch.zeros(64, 128, dtype=torch.bfloat16)})
    weight = ("layers.1.attn.indexer.weights_proj.weight", torch.zeros(64, 128).bfloat16())
    with pytest.raises(ValueError, match=r"1 unexpected: \S+weights_proj.weight_scale$"):
        loader.load([weight, (f"{weight[0]}_scale", torch.ones(1, 1))])


def test_fp8_of_a_module_that_is_not_listed_is_refused():
    name = "model.layers.1.ffn.gate.weight"
    loader = target([name], **{name: torch.zeros(4, 128, dtype=torch.bfloat16)})
    fp8 = torch.zeros(4, 128, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"1 of a wrong type: \S+ \(float8_e4m3fn into bfloat16\)"):
        loader.load([("layers.1.ffn.gate.weight", fp8)])


@pytest.mark.parametrize(
    ("given", "wanted", "leaf"),
    [
        (torch.bfloat16, torch.float8_e4m3fn, "weight"),
        (torch.float32, torch.float8_e4m3fn, "weight"),
        (torch.uint8, torch.float8_e4m3fn, "weight"),
        (torch.uint8, torch.float32, "weight_scale"),
        (torch.uint8, torch.float8_e8m0fnu, "weight_scale"),
        (torch.float8_e4m3fn, torch.bfloat16, "weight"),
        (torch.float8_e4m3fn, torch.uint8, "weight"),
        (torch.float32, torch.float8_e8m0fnu, "weight_scale"),
        (torch.bfloat16, torch.int32, "weight_packed"),
        (torch.int64, torch.int32, "weight_packed"),
        (torch.int64, torch.float32, "weight_scale"),
        (torch.float64, torch.float32, "hc_head_fn"),
    ],
)
def test_a_copy_that_would_change_the_numbers_is_refused(given, wanted, leaf):
    with pytest.raises(TypeError, match=rf"x\.{leaf} \(\w+ into \w+\)"):
        as_stored(f"x.{leaf}", torch.zeros(2).to(given), torch.zeros(2).to(wanted))


@pytest.mark.parametrize(
    ("given", "wanted", "leaf", "value"),
    [
        (torch.float8_e8m0fnu, torch.float32, "weight_scale", 2.0**-7),
        (torch.float8_e8m0fnu, torch.uint8, "weight_scale", 120),  # the exponent's bits
        (torch.float32, torch.bfloat16, "weight", 2.0**-7),
        (torch.bfloat16, torch.float32, "attn_sink", 2.0**-7),
    ],
)
def test_a_copy_keeps_the_value_or_the_bits(given, wanted, leaf, value):
    parameter = torch.zeros(1).to(wanted)
    parameter.copy_(as_stored(f"x.{leaf}", torch.tensor([2.0**-7]).to(given), parameter))
    assert parameter.float().item() == value


def test_expert_ids_and_shapes_may_change_their_type():
    assert as_stored("gate.tid2eid", torch.tensor([5]), torch.zeros(1, dtype=torch.int32)) == 5
    assert as_stored("w.weight_shape", torch.tensor([4096]), torch.zeros(1).bfloat16()) == 4096


@pytest.mark.parametrize(("rank", "heads"), [(0, [0.0, 1.0]), (1, [2.0, 3.0])])
def test_each_rank_takes_its_heads_of_the_attention_sink(rank, heads):
    name = "model.layers.0.attn.attn_sink"
    model = Model([name], **{name: torch.full((3,), -1.0)})  # two heads and one of padding
    loader = StrictLoader(model, Part.TARGET, num_experts=1, tp_rank=rank, tp_size=2)
    loader.load([("layers.0.attn.attn_sink", torch.arange(4.0))])
    assert loader.parameters[name].tolist() == [*heads, float("-inf")]


CONFIG = flash_config()
SIZES = FullSizes(CONFIG, group_size=128)
INT4, FP8, BF16, U8, F32 = (
    torch.int32,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.uint8,
    torch.float32,
)


@pytest.mark.parametrize(
    ("name", "dtype", "weight_dtype", "size"),
    [
        ("embed.weight", BF16, BF16, (129280, 4096)),
        ("mtp.0.head.weight", BF16, BF16, (129280, 4096)),
        ("layers.0.attn.attn_sink", F32, F32, (64,)),
        ("layers.0.ffn.gate.tid2eid", INT4, INT4, (129280, 6)),
        ("mtp.0.attn.wo_b.weight", FP8, FP8, (4096, 8192)),
        ("mtp.0.attn.wo_b.weight_scale", F32, FP8, (32, 64)),
        ("mtp.0.ffn.experts.255.w2.weight_packed", INT4, INT4, (4096, 256)),
        ("mtp.0.ffn.experts.255.w2.weight_scale", BF16, INT4, (4096, 16)),
        ("mtp.0.ffn.experts.255.w2.weight_shape", INT4, INT4, (2,)),
        ("mtp.0.ffn.experts.255.w2.weight", BF16, BF16, (4096, 2048)),
        ("mtp.0.ffn.experts.255.w2.weight", U8, U8, (4096, 1024)),
        ("mtp.0.ffn.experts.255.w2.weight_scale", U8, U8, (4096, 64)),
        ("mtp.0.enorm.weight", BF16, BF16, (4096,)),
    ],
)
def test_whole_sizes_of_flash(name, dtype, weight_dtype, size):
    assert SIZES.knows(name)
    assert SIZES.size(name, dtype, weight_dtype) == size


@pytest.mark.parametrize(("group_size", "groups"), [(32, 64), (64, 32), (128, 16), (-1, 1)])
def test_the_group_of_an_int4_scale_is_the_engine_s(group_size, groups):
    sizes = FullSizes(CONFIG, group_size)
    assert sizes.size("layers.9.ffn.experts.0.w2.weight_scale", BF16, INT4) == (4096, groups)


def test_every_tensor_of_the_published_layout_has_its_size():
    """Shapes as the headers of the published checkpoints have them."""
    dtypes = {"BF16": BF16, "F32": F32, "F8_E4M3": FP8, "I32": INT4, "I64": torch.int64}
    for spec in checkpoint_tensors(CONFIG):
        module = spec.name.rpartition(".")[0]
        weight = INT4 if ".experts." in module else FP8
        assert SIZES.size(canonical_name(spec.name), dtypes[spec.dtype], weight) == spec.shape


def test_a_weight_shape_of_another_weight_is_refused():
    name = "mtp.0.ffn.experts.3.w2.weight_shape"
    SIZES.check(name, torch.tensor([4096, 2048]), INT4)
    with pytest.raises(ValueError, match=r"says \[2048, 4096\], must say \[4096, 2048\]"):
        SIZES.check(name, torch.tensor([2048, 4096]), INT4)


def test_one_value_may_have_any_number_of_dimensions():
    SIZES.check("hc_head_scale", torch.tensor(1.0), F32)


def test_a_parameter_of_which_the_config_knows_nothing_is_refused():
    names = ["model.layers.1.ffn.gate.bias_vl"]
    with pytest.raises(ValueError, match=r"no size for 1 tensors: layers\.1\.ffn\.gate\.bias_vl$"):
        StrictLoader(Model(names), Part.TARGET, 2, sizes=SIZES)


def with_group_sizes(*sizes: int | None) -> nn.Module:
    """A model whose layers have quantization methods of these group sizes; None has none."""
    layers = nn.ModuleList(nn.Module() for _ in sizes)
    for layer, size in zip(layers, sizes, strict=True):
        layer.quant_method = SimpleNamespace(group_size=size)
    return layers


def test_the_engine_s_group_size_is_one():
    assert int4_group_size(with_group_sizes(None, 64, 64)) == 64
    assert int4_group_size(with_group_sizes(None)) is None
    with pytest.raises(RuntimeError, match=r"group_size \[64, 128\]; must agree"):
        int4_group_size(with_group_sizes(128, None, 64))
