"""What `verify` calls sound is what an engine computes rightly with: values, schemes, config.json.

Each case is the good checkpoint with one thing changed.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kernels.formats import dequantize_fp8_block
from retrofit import experts, matching, mtp, verify
from retrofit.__main__ import main
from retrofit.errors import BadInput
from retrofit.reading import CONFIG, Checkpoint, open_checkpoint, scan
from scripts.make_full_size import FP8_COMPRESSOR_TARGETS
from tests.retrofit.folders import (
    HEAD_LAYER,
    config,
    copy_of,
    edit_config,
    edit_json,
    edit_tensors,
    group,
    weights,
)

EXPERT = "layers.2.ffn.experts.3.w1"
ATTENTION = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")


def filled(name: str, value: float):
    return lambda folder: edit_tensors(folder, name, lambda v: v[name].fill_(value))


def one_nan_byte(folder: Path) -> None:
    name = "layers.2.attn.wo_b.weight"
    edit_tensors(folder, name, lambda v: v[name].view(torch.uint8)[3].fill_(0xFF))


def negative_expert(folder: Path) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    edit_tensors(folder, name, lambda v: v[name][5].fill_(-1))


def to_bf16(*stems: str):
    """The same values without quantization."""

    def change(values: dict) -> None:
        for stem in stems:
            scale = values.pop(f"{stem}.weight_scale")
            weight = values[f"{stem}.weight"]
            values[f"{stem}.weight"] = dequantize_fp8_block(weight, scale, torch.bfloat16)

    return lambda folder: edit_tensors(folder, f"{stems[0]}.weight", change)


def ignore(*names: str):
    return config(lambda c: c["quantization_config"].update(ignore=list(names)))


def swap_formats(settings: dict) -> None:
    groups = settings["quantization_config"]["config_groups"]
    groups["attention"]["format"], groups["experts"]["format"] = (
        groups["experts"]["format"],
        groups["attention"]["format"],
    )


def alias_of_another_shape(folder: Path) -> None:
    edit_tensors(
        folder, "mtp.0.norm.weight", lambda v: v.update({"mtp.0.head.weight": torch.ones(3, 3)})
    )


INT8_INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
# name -> (change, what a fault must hold)
UNSOUND = {
    "expert's scales NaN": (filled(f"{EXPERT}.weight_scale", torch.nan), "weight_scale: holds NaN"),
    "expert's scales 0": (filled(f"{EXPERT}.weight_scale", 0), f"{EXPERT}.weight_scale: a scale"),
    "exponents as numbers": (
        filled("layers.2.attn.wq_b.weight_scale", 119),
        "layers.2.attn.wq_b.weight_scale: the median scale is 119",
    ),
    "shape of another": (filled(f"{EXPERT}.weight_shape", 7), "[7, 7]; must be [256, 256]"),
    "expert ids too large": (
        filled("layers.0.ffn.gate.tid2eid", 999),
        "tid2eid: expert ids in [999, 999]; must be in [0, 15]",
    ),
    "expert ids negative": (negative_expert, "tid2eid: expert ids in [-1, "),
    "embedding of zeros": (filled("embed.weight", 0), "embed.weight: all values are 0"),
    "FP8 weight of zeros": (filled("layers.1.attn.wkv.weight", 0), "wkv.weight: all values are 0"),
    "FP8 weight with NaN": (one_nan_byte, "layers.2.attn.wo_b.weight: holds NaN"),
    "infinite mixer": (filled("layers.3.hc_ffn_fn", torch.inf), "layers.3.hc_ffn_fn: holds NaN or"),
    "words of a hole": (
        filled("mtp.0.ffn.experts.3.w1.weight_packed", 0),
        "mtp.0.ffn.experts.3.w1.weight_packed: all words are 0",
    ),
    "alias of another shape": (
        alias_of_another_shape,
        "mtp.0.head.weight: shape [3, 3]; must be [2048, 256]",
    ),
    "attention BF16, said to be FP8": (
        to_bf16("layers.0.attn.wq_a"),
        "layers.0.attn.wq_a.weight: dtype BF16; must be F8_E4M3",
    ),
    "indexer BF16, said to be FP8": (
        to_bf16("layers.1.attn.indexer.wq_b"),
        "layers.1.attn.indexer.wq_b.weight: dtype BF16; must be F8_E4M3",
    ),
    "attention FP8, said to be none": (
        ignore(r"re:.*layers\.2\.attn\..*"),
        "layers.2.attn.wo_a.weight: dtype F8_E4M3; must be BF16",
    ),
    "trunk's experts ignored": (
        ignore(r"re:.*layers\.[0-3]\.ffn\.experts\..*"),
        "the targets give 192 modules such as layers.0.ffn.experts.0.w1 'none'; 'int4 group' is",
    ),
    "shared experts of a layer quantized": (
        group("attention", targets=[r"re:.*attn\.(w.*|fused.*|indexer\.wq_b)$",
                                    r"re:.*layers\.1\.ffn\.shared_experts\..*"]),
        "the targets give 3 modules such as layers.1.ffn.shared_experts.w1 'float8 block'",
    ),
    "formats swapped": (config(swap_formats), "'attention' has format = 'pack-quantized'"),
    "a group without a type": (
        weights("attention", type=None),
        "'attention': type = None; float or int",
    ),
    "blocks of 64": (
        weights("attention", block_structure=[64, 64]),
        "block_structure = [64, 64]; 8 and [128",
    ),
    "FP8 without inputs": (
        group("attention", input_activations=None),
        "'attention': input_activations = None",
    ),
    "FP8 with INT8 inputs": (
        group("attention", input_activations=INT8_INPUTS),
        "'attention': input_activations = {",
    ),
    "INT4 with inputs": (
        group("experts", input_activations=INT8_INPUTS),
        "'experts': input_activations = {",
    ),
    "a limit of null": (config(lambda c: c.update(swiglu_limit=None)), "swiglu_limit is missing"),
}  # fmt: skip


def faults_of(good: Path, place: Path, change) -> list[str]:
    folder = copy_of(good, place)
    change(folder)
    return verify.check(scan(folder)).faults


@pytest.mark.parametrize("case", UNSOUND)
def test_verify_does_not_call_it_sound(case, good, tmp_path):
    change, message = UNSOUND[case]
    faults = faults_of(good, tmp_path / "broken", change)
    assert any(message in fault for fault in faults), faults[:5]


def published_targets(folder: Path) -> None:
    """Broad targets, and compressor and indexer in FP8 with scales in BF16."""

    def to_fp8(values: dict) -> None:
        for stem in ("compressor.wkv", "indexer.weights_proj", "indexer.compressor.wgate"):
            name = f"layers.1.attn.{stem}.weight"
            rows, columns = values[name].shape
            values[name] = values[name].to(torch.float8_e4m3fn)
            values[f"{name}_scale"] = torch.full((-(-rows // 128), columns // 128), 0.5).bfloat16()

    def add(settings: dict) -> None:
        groups = settings["quantization_config"]["config_groups"]
        groups["attention"]["targets"] += FP8_COMPRESSOR_TARGETS

    edit_tensors(folder, "layers.1.attn.compressor.wkv.weight", to_fp8)
    edit_config(folder, add)


def literal_targets(folder: Path) -> None:
    """The trunk's modules by their names in the checkpoint, the head's by an expression."""
    names = [f"layers.{layer}.attn.{name}" for layer in range(HEAD_LAYER) for name in ATTENTION]
    names += ["layers.1.attn.indexer.wq_b", "layers.3.attn.indexer.wq_b"]
    group("attention", targets=[*names, rf"re:.*layers\.{HEAD_LAYER}\.attn\.w.*"])(folder)


def bf16_layer(folder: Path) -> None:
    to_bf16(*(f"layers.0.attn.{name}" for name in ATTENTION))(folder)
    ignore(r"re:.*layers\.0\.attn\..*")(folder)


@pytest.mark.parametrize(
    "change",
    [
        published_targets,
        literal_targets,
        bf16_layer,
        filled("layers.1.ffn.gate.bias", 0),
        filled("layers.1.attn.attn_sink", 0),
    ],
    ids=["published targets", "literal targets", "a BF16 layer", "no router bias", "no sink"],
)
def test_what_an_engine_computes_rightly_with_is_sound(change, good, tmp_path):
    assert faults_of(good, tmp_path / "other", change) == []


@pytest.mark.parametrize(
    "key",
    [
        "architectures", "compress_rope_theta", "hc_eps", "index_topk", "norm_topk_prob",
        "qk_rope_head_dim", "rms_norm_eps", "rope_scaling", "rope_theta", "routed_scaling_factor",
        "sliding_window", "swiglu_limit",
    ],
)  # fmt: skip
def test_a_key_that_an_engine_would_fill_in_must_be_there(key, good):
    settings = json.loads((good / CONFIG).read_text())
    assert matching.config_faults(settings) == []
    del settings[key]
    assert [fault.split(":")[1] for fault in matching.config_faults(settings)] == [
        f" {key} is missing"
    ]


# ------------------------------------------------------------------------------ mtp's config


def checkpoint_with(checkpoint: Checkpoint, settings: dict) -> Checkpoint:
    return dataclasses.replace(checkpoint, config=settings)


def test_every_key_that_the_base_lost_is_restored(original, base):
    source, whole = open_checkpoint(original), open_checkpoint(base)
    left = {key: whole.config[key] for key in ("model_type", "quantization_config")}
    assert mtp.merged_config(source, checkpoint_with(whole, left)) == whole.config


@pytest.mark.parametrize(
    ("key", "value"), [("routed_scaling_factor", 2.5), ("rope_theta", 50000), ("index_topk", 64)]
)
def test_a_base_of_another_model_is_refused(key, value, original, base):
    other = open_checkpoint(base)
    other = checkpoint_with(other, other.config | {key: value})
    with pytest.raises(BadInput, match=rf"{key} = {value}, and .* in .*; the base must be"):
        mtp.merged_config(open_checkpoint(original), other)


def test_a_base_whose_config_went_through_transformers_becomes_one_that_vllm_reads(
    original, base, tmp_path
):
    transformers = pytest.importorskip("transformers")
    get_config = pytest.importorskip("vllm.transformers_utils.config").get_config
    plain = copy_of(original, tmp_path / "plain")
    edit_config(plain, lambda c: c.pop("quantization_config"))
    if not hasattr(transformers, "DeepseekV4Config"):
        pytest.skip(f"transformers {transformers.__version__} has no DeepseekV4Config")
    transformers.DeepseekV4Config.from_pretrained(plain).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / CONFIG).read_text())
    whole = open_checkpoint(base)
    saved["quantization_config"] = whole.config["quantization_config"]
    fault = matching.vllm_faults(saved)[0]
    assert "vLLM 0.32.0 refuses config.json: " in fault
    assert "\n" not in fault
    merged = mtp.merged_config(open_checkpoint(original), checkpoint_with(whole, saved))
    assert matching.vllm_faults(merged) == []
    edit_json(plain / CONFIG, lambda c: (c.clear(), c.update(merged)))
    ours, theirs = (get_config(str(f), trust_remote_code=False).to_dict() for f in (base, plain))
    assert {key: theirs[key] for key in ours if key != "_name_or_path"} == {
        key: value for key, value in ours.items() if key != "_name_or_path"
    }


def test_values_of_the_base_are_read_before_an_expert_is_quantized(
    original, base, tmp_path, monkeypatch, capsys
):
    folder = copy_of(base, tmp_path / "base")
    filled(f"{EXPERT}.weight_scale", torch.nan)(folder)

    def never(*_: object) -> None:
        raise AssertionError("an expert was quantized")

    monkeypatch.setattr(experts, "quantize_experts", never)
    assert main(["mtp", str(original), str(folder), str(tmp_path / "dst"), "--rtn"]) == 2
    assert f"{folder}: {EXPERT}.weight_scale: holds NaN" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


# ---------------------------------------------------------------------------- vLLM's answers


def test_what_vllm_asserts_is_a_fault_of_one_line(good):
    pytest.importorskip("vllm")
    settings = json.loads((good / CONFIG).read_text())
    swap_formats(settings)
    assert matching.vllm_faults(settings) == [
        "vLLM 0.32.0 refuses quantization_config: AssertionError"
    ]
    settings = json.loads((good / CONFIG).read_text())
    inputs = settings["quantization_config"]["config_groups"]["attention"]["input_activations"]
    inputs["strategy"] = "bogus"
    (fault,) = matching.vllm_faults(settings)
    assert "'bogus' is not a valid QuantizationStrategy" in fault
    assert "\n" not in fault


def test_another_vllm_is_not_asked_and_a_line_says_so(good, monkeypatch):
    vllm = pytest.importorskip("vllm")
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    monkeypatch.setattr(matching, "_nvidia_mapper", None)  # it may not be where it was
    report = verify.check(scan(good))
    assert report.faults == []
    assert any("skipped: vllm 0.33.0 is installed" in note for note in report.notes)
