"""Good and broken checkpoints, through vLLM's NVIDIA classes on a fake GPU."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("vllm")

from tests.loader.scenarios import SCENARIOS

pytestmark = [pytest.mark.engine, pytest.mark.slow]

COMPLETE = None
HEAD = "load of the MTP head: "
TARGET = "load of the target: "
ALL_OF_THE_HEAD = (
    HEAD + r"70 missing: mtp\.0\.attn\.attn_sink, .*; the checkpoint has no mtp\.\* tensor"
)
EXPECTED: dict[str, dict[str, str | None]] = {
    "A wide regexes, BF16 compressor": {"target": COMPLETE, "draft": COMPLETE},
    "B FP8 compressor and indexer": {"target": COMPLETE, "draft": COMPLETE},
    "C regexes of checkpoint names only": {"target": COMPLETE, "draft": COMPLETE},
    "D literal names": {"target": COMPLETE, "draft": COMPLETE},
    "E no mtp.* tensor": {"target": COMPLETE, "draft": ALL_OF_THE_HEAD},
    "F MTP without w2": {
        "draft": HEAD + r"13 missing: mtp\.0\.ffn\.experts\.0\.w2\.weight_packed, .*"
        r"mtp\.0\.ffn\.shared_experts\.w2\.weight"
    },
    "G MTP experts named gate/up/down_proj": {
        "draft": HEAD + r"36 missing: mtp\.0\.ffn\.experts\.0\.w1\.weight_packed, .*; "
        r"36 unexpected: mtp\.0\.ffn\.experts\.0\.down_proj\.weight_packed"
    },
    "H MTP scales named weight_scale_inv": {"draft": COMPLETE},
    "I MTP scales named scale": {"draft": COMPLETE},
    "J MTP attention in BF16": {
        "draft": HEAD + r"5 missing: .*wq_b\.weight_scale; 5 of a wrong type: "
        r"mtp\.0\.attn\.wkv\.weight \(bfloat16 into float8_e4m3fn\)"
    },
    "K one MTP attention scale absent": {
        "draft": HEAD + r"1 missing: mtp\.0\.attn\.wq_b\.weight_scale$"
    },
    "L complete, with embedding and head aliases": {"draft": COMPLETE},
    "M one MTP expert absent": {
        "draft": HEAD + r"9 missing: (mtp\.0\.ffn\.experts\.1\.w[123]\.weight_\w+(, )?){9}$"
    },
    "N MTP router bias absent": {"draft": HEAD + r"1 missing: mtp\.0\.ffn\.gate\.bias$"},
    "O MTP scales as E8M0": {"draft": COMPLETE},
    "P MTP scales as uint8": {
        "draft": HEAD + r"5 of a wrong type: mtp\.0\.attn\.wkv\.weight_scale \(uint8 into float32\)"
    },
    "Q experts named gate/up/down_proj": {
        "target": TARGET + r"108 missing: .*; 108 unexpected: "
        r"layers\.0\.ffn\.experts\.0\.down_proj\.weight_packed"
    },
    "R experts with weight_g_idx": {
        "target": TARGET + r"36 unexpected: layers\.0\.ffn\.experts\.0\.w1\.weight_g_idx"
    },
    "S one projection misnamed": {
        "target": TARGET + r"3 missing: layers\.1\.ffn\.experts\.2\.w1\.weight_packed, .*; "
        r"3 unexpected: layers\.1\.ffn\.experts\.2\.gate\.weight_packed"
    },
    "T one expert absent": {
        "target": TARGET + r"9 missing: (layers\.1\.ffn\.experts\.2\.w[123]\.weight_\w+(, )?){9}$"
    },
    "U one attention scale absent": {
        "target": TARGET + r"1 missing: layers\.1\.attn\.wq_b\.weight_scale$"
    },
    "MTP names with model. in front": {"draft": COMPLETE},
    "MTP names as a layer of the target": {
        "target": TARGET + r"70 unexpected: layers\.3\.attn\.attn_sink",
        "draft": ALL_OF_THE_HEAD,
    },
    "MTP e_proj and h_proj in FP8": {"draft": COMPLETE},
    "MTP shared experts named gate/up/down_proj": {
        "draft": HEAD + r"3 missing: mtp\.0\.ffn\.shared_experts\.w1\.weight, .*; "
        r"3 unexpected: mtp\.0\.ffn\.shared_experts\.down_proj\.weight"
    },
    "MTP routed experts absent": {
        "draft": HEAD + r"36 missing: mtp\.0\.ffn\.experts\.0\.w1\.weight_packed"
    },
    "MTP w1.weight_packed misnamed": {
        "draft": HEAD + r"4 missing: mtp\.0\.ffn\.experts\.0\.w1\.weight_packed, .*; "
        r"4 unexpected: mtp\.0\.ffn\.experts\.0\.w1\.qweight"
    },
    "MTP of one norm tensor": {"draft": HEAD + r"69 missing: "},
    "MTP wholly in BF16, regexes say INT4": {
        "draft": HEAD + r"41 missing: .*; 12 unexpected: mtp\.0\.ffn\.experts\.0\.w1\.weight, .*; "
        r"5 of a wrong type"
    },
    "MTP wholly in BF16, ignored by its layer": {"draft": COMPLETE},
    "MTP wholly in BF16, ignored as mtp": {"draft": COMPLETE},
    "MTP as DeepSeek published it": {
        "draft": HEAD + r"24 missing: .*; 12 unexpected: mtp\.0\.ffn\.experts\.0\.w1\.weight, .*; "
        r"12 of a wrong size: .*w1\.weight_scale \(\[256, 8\], must be \[256, 2\]\)"
    },
    "all as DeepSeek published it": {"target": COMPLETE, "draft": COMPLETE},
    "MTP shard not in the index": {"draft": ALL_OF_THE_HEAD},
    "compressor scale absent": {
        "target": TARGET + r"1 missing: layers\.2\.attn\.compressor\.wkv\.weight_scale$"
    },
    "router bias named e_score_correction_bias": {"target": COMPLETE},
    "router bias given twice": {
        "target": TARGET + r"1 given twice: layers\.1\.ffn\.gate\.e_score_correction_bias$"
    },
    "a tensor of another model": {"target": TARGET + r"1 unexpected: layers\.1\.attn\.k_scale$"},
    "a tensor of another shape": {
        "target": TARGET + r"1 of a wrong size: layers\.1\.attn\.wq_b\.weight "
        r"\(\[8064, 128\], must be \[8192, 128\]\)$"
    },
    "no two values alike": {"target": COMPLETE, "draft": COMPLETE},
    "INT4 in groups of 64": {"target": COMPLETE, "draft": COMPLETE},
    "MTP in groups of 128, the config says 64": {
        "target": COMPLETE,
        "draft": HEAD + r"12 of a wrong size: mtp\.0\.ffn\.experts\.0\.w1\.weight_scale "
        r"\(\[256, 2\], must be \[256, 4\]\)",
    },
    "MTP scales of groups twice as wide": {
        "draft": HEAD + r"4 of a wrong size: mtp\.0\.ffn\.experts\.0\.w2\.weight_scale "
        r"\(\[256, 1\], must be \[256, 2\]\)"
    },
    "MTP experts of half the width": {
        "draft": HEAD + r"12 of a wrong size: mtp\.0\.ffn\.experts\.0\.w1\.weight_packed "
        r"\(\[128, 32\], must be \[256, 32\]\)"
    },
    "more query heads than the config's": {
        "target": TARGET + r"2 of a wrong size: layers\.1\.attn\.wq_b\.weight \(\[16384, 128\], "
    },
    "half the attention sinks": {
        "target": TARGET + r"3 of a wrong size: layers\.0\.attn\.attn_sink \(\[8\], must be \[16\]"
    },
    "twice the attention sinks": {"target": TARGET + r"3 of a wrong size: .*must be \[16\]"},
    "compressor scales of another size": {
        "target": TARGET + r"1 of a wrong size: layers\.2\.attn\.compressor\.wkv\.weight "
        r"\(dequantize_fp8_block: scale shape"
    },
}


def test_the_table_names_every_scenario_and_model():
    assert {name: set(models) for name, models in EXPECTED.items()} == {
        name: set(scenario.parts) for name, scenario in SCENARIOS.items()
    }


@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name, models in EXPECTED.items() for part in models]
)
def test_a_checkpoint_loads_completely_or_is_refused_by_name(outcomes, name, part):
    result, message = outcomes[name][part], EXPECTED[name][part]
    if message is COMPLETE:
        assert result["outcome"] == "complete", result
    else:
        assert result["outcome"] == "ValueError", result
        assert re.match(message, result["message"]), result["message"]


def test_no_row_is_silent(outcomes):
    silent = [
        (name, part)
        for name, models in outcomes.items()
        for part, result in models.items()
        if result["outcome"] == "SILENT"
    ]
    assert silent == []


def test_at_most_20_names_of_a_kind_are_listed(outcomes):
    message = outcomes["E no mtp.* tensor"]["draft"]["message"]
    assert message.count("mtp.0.") == 20


def test_e8m0_scales_keep_their_value(outcomes):
    assert outcomes["O MTP scales as E8M0"]["draft"]["scale"] == 2.0**-7


@pytest.mark.parametrize(
    "name",
    ["A wide regexes, BF16 compressor", "C regexes of checkpoint names only", "D literal names"],
)
def test_each_way_to_write_the_targets_gives_the_head_the_same_schemes(outcomes, name):
    """Scheme and kernel of each module, as on sm_120."""
    modules = {
        module["module"].removeprefix("model.layers.*."): (module["scheme"], module["kernel"])
        for module in outcomes[name]["draft"]["modules"]
    }
    fp8 = ("CompressedTensorsW8A8Fp8", "DeepGemmFp8BlockScaledMMKernel")
    for projection in ("fused_wqa_wkv", "wq_b", "wo_a", "wo_b"):
        assert modules[f"attn.{projection}"] == fp8
    assert modules["ffn.experts.routed_experts"] == (
        "CompressedTensorsWNA16MoEMethod",
        "MarlinExperts",
    )
    for name in ("e_proj", "h_proj", "ffn.shared_experts.down_proj"):
        assert modules[name] == ("UnquantizedLinearMethod", "")
    assert outcomes["A wide regexes, BF16 compressor"]["draft"]["attention"] == {
        "DeepseekV4FlashInferSM120Attention": 1
    }
