"""The commands end to end on the tiny model: bytes, resume, options, refusals, reports."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kernels.formats import dequantize_fp4, dequantize_fp8_block, dequantize_int4, quantize_int4
from kernels.weights import Kind, Layout, tensors, trunk_weights
from retrofit import experts, matching, mtp, quantize_base, verify, writing
from retrofit.__main__ import main
from retrofit.calibration import Calibration, CalibrationWriter
from retrofit.errors import BadInput
from retrofit.layout import check_sizes, head_tensors
from retrofit.mtp import SHARD
from retrofit.progress import Progress, duration
from retrofit.reading import CONFIG, INDEX, open_checkpoint, scan
from retrofit.writing import ShardWriter
from tests.retrofit.folders import (
    HEAD_LAYER,
    HIDDEN,
    NUM_EXPERTS,
    TOPK,
    calibration_rows,
    copy_of,
    digest,
    edit_config,
    edit_json,
    edit_tensors,
    write_calibration,
)

ROOT = Path(__file__).parents[2]
FLASH = json.loads((ROOT / "serve" / "flash.json").read_text())


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        values |= load_file(path)
    return values


# ------------------------------------------------------------------------ names and counts


def test_the_formula_gives_flashs_published_counts():
    assert len(head_tensors(FLASH, Layout.ORIGINAL)) == 1575
    assert len(head_tensors(FLASH, Layout.W4A16)) == 2338
    assert len(head_tensors(FLASH, Layout.BF16)) == 797
    originals = sum(len(tensors(w, Layout.ORIGINAL)) for w in trunk_weights(FLASH))
    assert originals + 1575 == 69_187
    # As first published: attention, compressor and indexer FP8, so one scale more each.
    fp8 = sum(w.kind == Kind.ATTENTION or "compressor.w" in w.name or "weights_proj" in w.name
              for w in trunk_weights(FLASH))  # fmt: skip
    experts_ = sum(w.kind == Kind.EXPERT for w in trunk_weights(FLASH))
    assert fp8 + experts_ == 33_405
    assert fp8 + 2 * experts_ + sum(1 for _ in trunk_weights(FLASH)) == 100_652


def test_the_shard_of_flash_has_the_published_size():
    size = sum(
        quantize_base.spec_bytes(spec.dtypes[0], spec.shape)
        for spec in head_tensors(FLASH, Layout.W4A16).values()
    )
    assert round(size / 1e9, 2) == 3.55


def test_every_tensor_of_the_tiny_checkpoint_follows_from_its_config(original, good):
    checkpoint = open_checkpoint(original)
    wanted = head_tensors(checkpoint.config, Layout.ORIGINAL)
    assert wanted.keys() == {n for n in checkpoint.entries if n.startswith("mtp.")}
    head = {n for n in open_checkpoint(good).entries if n.startswith("mtp.")}
    assert head == head_tensors(checkpoint.config, Layout.W4A16).keys()
    assert len(head) == 34 + 3 * 3 * NUM_EXPERTS


# --------------------------------------------------------------------------- quantize-base


def test_the_base_is_the_tiny_exporters_w4a16_without_the_head(original, base, tmp_path):
    from tiny import export, load

    folder = tmp_path / "exported"
    export.export(load.load(original), folder, export.Layout.W4A16)
    theirs = {n: t for n, t in read_all(folder).items() if not n.startswith("mtp.")}
    ours = read_all(base)
    assert ours.keys() == theirs.keys()
    # The exporter rounds FP8 again, and may choose another power of two for the same values.
    for name in ours:
        scale = name.removesuffix("weight") + "weight_scale"
        if ours[name].dtype == torch.float8_e4m3fn:
            a, b = (dequantize_fp8_block(t[name], t[scale]) for t in (ours, theirs))
            assert torch.equal(a, b), name
        elif f"{name.removesuffix('_scale')}" not in ours:
            assert torch.equal(ours[name], theirs[name]), name
    assert verify.check(scan(base)).faults == ["no tensor is named mtp.0.*: the head is absent"]
    configs = [json.loads((path / CONFIG).read_text()) for path in (base, folder)]
    assert configs[0] == configs[1]
    assert (base / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()


def test_options_of_quantize_base(original, base, tmp_path):
    with_head = tmp_path / "rtn"
    arguments = ["quantize-base", str(original), str(with_head), "--shard-bytes", "4000000"]
    assert main([*arguments, "--mtp", "rtn", "--scale", "mse"]) == 0
    assert verify.check(scan(with_head)).faults == []
    assert len(list(with_head.glob("*.safetensors"))) > 4
    ours, absmax = read_all(with_head), read_all(base)
    name = "layers.1.ffn.experts.0.w1.weight_scale"
    assert not torch.equal(ours[name], absmax[name])


def test_a_base_that_was_interrupted_has_the_same_bytes(original, tmp_path, monkeypatch):
    config = {"source": original, "scale": "absmax", "shard_bytes": 4_000_000}
    whole = tmp_path / "whole"
    quantize_base.run(quantize_base.QuantizeBaseConfig(dst=whole, **config))
    dst = tmp_path / "dst"
    convert, calls = quantize_base.pack.convert, []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 150:
            raise KeyboardInterrupt
        return convert(*arguments)

    monkeypatch.setattr(quantize_base.pack, "convert", interrupt)
    options = ["quantize-base", str(original), str(dst), "--scale", "absmax", "--shard-bytes"]
    assert main([*options, "4000000"]) == 130
    assert not dst.exists()
    assert main([*options, "4000001"]) == 2  # other options: what is there is not continued
    assert main([*options, "4000000"]) == 0
    assert digest(dst) == digest(whole)
    assert len(calls) - 150 < 306 - 100  # shards that were whole were not made again
    assert list(tmp_path.glob("*.partial")) == []


def test_quantize_base_refuses_what_is_no_complete_original(original, base, tmp_path, capsys):
    broken = copy_of(original, tmp_path / "broken")
    name = "layers.2.ffn.experts.3.w1.scale"
    edit_tensors(broken, name, lambda v: v.pop(name))
    for source, message in ((broken, f"{name}: is missing"), (base, "scale: is missing")):
        assert main(["quantize-base", str(source), str(tmp_path / "dst")]) == 2
        assert message in capsys.readouterr().err
    assert main(["quantize-base", str(original), str(tmp_path / "x"), "--shard-bytes", "0"]) == 2
    nan = copy_of(original, tmp_path / "nan")
    not_a_number = torch.full((256, 8), torch.nan).to(torch.float8_e8m0fnu)
    edit_tensors(nan, name, lambda v: v.update({name: not_a_number}))
    assert main(["quantize-base", str(nan), str(tmp_path / "dst")]) == 2
    assert f"{name} holds NaN" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "nan"]


# ------------------------------------------------------------------------------------- mtp


def test_what_is_not_an_expert_is_the_originals(original, good):
    source, head = read_all(original), load_file(good / SHARD)
    for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"):
        stem = f"mtp.0.attn.{name}"
        assert torch.equal(
            head[f"{stem}.weight"].view(torch.uint8), source[f"{stem}.weight"].view(torch.uint8)
        )
        assert head[f"{stem}.weight_scale"].dtype == torch.float32
        assert torch.equal(head[f"{stem}.weight_scale"], source[f"{stem}.scale"].float())
    for stem in ("e_proj", "h_proj", *(f"ffn.shared_experts.w{i}" for i in (1, 2, 3))):
        weight, scale = (source[f"mtp.0.{stem}.{leaf}"] for leaf in ("weight", "scale"))
        expected = dequantize_fp8_block(weight, scale, torch.bfloat16)
        assert torch.equal(head[f"mtp.0.{stem}.weight"], expected)
    for name in ("norm.weight", "ffn.gate.weight", "ffn.gate.bias", "attn.attn_sink", "hc_head_fn"):
        assert torch.equal(head[f"mtp.0.{name}"], source[f"mtp.0.{name}"])
        assert head[f"mtp.0.{name}"].dtype == source[f"mtp.0.{name}"].dtype


def test_the_bases_files_are_untouched_and_come_by_link(base, good):
    for path in base.glob("*.safetensors"):
        assert (good / path.name).samefile(path)
    names = json.loads((good / INDEX).read_text())["weight_map"]
    assert names["mtp.0.norm.weight"] == SHARD
    assert names["embed.weight"] != SHARD
    size = json.loads((good / INDEX).read_text())["metadata"]["total_size"]
    assert size == sum(entry.num_bytes for entry in scan(good).entries.values())
    assert not any((folder / writing.STATE).exists() for folder in (base, good))
    assert {path.name for path in good.iterdir()} == {
        *(path.name for path in base.iterdir()), SHARD, mtp.MANIFEST,
    }  # fmt: skip
    assert json.loads((good / CONFIG).read_text())["topk_method"] == "noaux_tc"


def test_the_manifest_records_each_choice(good, calibration):
    manifest = json.loads((good / "mtp_manifest.json").read_text())
    assert len(manifest["tensors"]) == 3 * NUM_EXPERTS
    counts = Calibration(calibration, HIDDEN, NUM_EXPERTS, TOPK).counts
    for name, record in manifest["tensors"].items():
        expert = int(re.search(r"experts\.(\d+)\.", name)[1])
        assert record["num_rows"] == counts[expert]
        assert record["error"] <= record["rtn_error"]
    methods = {record["method"] for record in manifest["tensors"].values()}
    assert "gptq" in methods
    assert manifest["settings"]["route_weight_in_h2"] is True
    assert manifest["calibration"]["model_sha256"] == "0" * 64
    assert "from the quantized w1 and w3" in manifest["w2_inputs"]


def test_gptq_is_better_than_rounding_on_rows_it_has_not_seen(original, base, good, tmp_path):
    """Output error of w1 of the busiest expert on fresh rows, against the data-free head."""
    rtn = tmp_path / "rtn"
    assert main(["mtp", str(original), str(base), str(rtn), "--rtn"]) == 0
    source = read_all(original)
    stem = "mtp.0.ffn.experts.0.w1"
    exact = dequantize_fp4(source[f"{stem}.weight"], source[f"{stem}.scale"])
    rows = calibration_rows(600, seed=5)[0]
    errors = {}
    for folder in (rtn, good):
        head = load_file(folder / SHARD)
        values = dequantize_int4(head[f"{stem}.weight_packed"], head[f"{stem}.weight_scale"])
        errors[folder] = float(((rows @ (values - exact).t()) ** 2).sum())
    assert errors[good] < 0.8 * errors[rtn]


def test_a_head_that_was_interrupted_has_the_same_bytes(
    original, base, calibration, good, tmp_path, monkeypatch
):
    before = digest(original), digest(base), digest(calibration)
    dst = tmp_path / "dst"
    quantize, calls = experts.quantize_experts, []

    def interrupt(batch, sample, settings):
        calls.append([expert.number for expert in batch])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return quantize(batch, sample, settings)

    monkeypatch.setattr(experts, "quantize_experts", interrupt)
    arguments = ["mtp", str(original), str(base), str(dst), "--calibration", str(calibration)]
    assert main(arguments) == 130
    assert not dst.exists()
    assert main([*arguments, "--percdamp", "0.02"]) == 2
    assert main(arguments) == 0
    assert calls == [[e] for e in [*range(6), *range(5, NUM_EXPERTS)]]
    assert digest(dst) == digest(good)
    assert (digest(original), digest(base), digest(calibration)) == before
    assert list(tmp_path.iterdir()) == [dst]


def test_a_step_that_ends_between_its_two_files_is_done_again(
    original, base, calibration, good, tmp_path, monkeypatch
):
    write_json = mtp.write_json

    def interrupt(path: Path, value: dict) -> None:
        if path.name.startswith("experts-00003"):
            raise KeyboardInterrupt
        write_json(path, value)

    dst = tmp_path / "dst"
    arguments = ["mtp", str(original), str(base), str(dst), "--calibration", str(calibration)]
    with monkeypatch.context() as patch:
        patch.setattr(mtp, "write_json", interrupt)
        assert main(arguments) == 130
    assert main(arguments) == 0
    assert digest(dst) == digest(good)


@pytest.mark.parametrize("changed", ["original", "base", "calibration"])
def test_a_run_is_not_continued_with_other_inputs(
    changed, original, base, tmp_path, monkeypatch, capsys
):
    inputs = {name: tmp_path / name for name in ("original", "base", "calibration")}
    copy_of(original, inputs["original"])
    copy_of(base, inputs["base"])
    write_calibration(inputs["calibration"])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    places = [str(inputs[name]) for name in ("original", "base")]
    arguments = ["mtp", *places, str(tmp_path / "dst"), "--calibration", str(inputs["calibration"])]
    with monkeypatch.context() as patch:
        patch.setattr(experts, "quantize_experts", interrupt)
        assert main(arguments) == 130
    name = "meta.json" if changed == "calibration" else CONFIG
    edit_json(inputs[changed] / name, lambda value: value.update(remark="another"))
    assert main(arguments) == 2
    assert "was left by a run with other inputs or options" in capsys.readouterr().err


def test_quantize_base_is_not_continued_with_another_source(original, tmp_path, monkeypatch):
    source, dst = copy_of(original, tmp_path / "source"), tmp_path / "dst"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantize_base.pack, "convert", interrupt)
        assert main(["quantize-base", str(source), str(dst)]) == 130
    edit_config(source, lambda c: c.update(remark="another"))
    assert main(["quantize-base", str(source), str(dst)]) == 2


def test_a_head_that_verify_refuses_is_not_given_its_name(
    original, base, tmp_path, monkeypatch, capsys
):
    def exponents(stem: str, weight: torch.Tensor, scale: torch.Tensor) -> dict:
        values = scale.view(torch.uint8).float()
        return {f"{stem}.weight": weight, f"{stem}.weight_scale": values}

    monkeypatch.setattr(mtp.pack, "attention_tensors", exponents)
    assert main(["mtp", str(original), str(base), str(tmp_path / "dst"), "--rtn"]) == 2
    assert "exponents, copied as numbers" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "dst.partial"]  # the steps' results are in it


@pytest.mark.parametrize(
    "option",
    [
        ["--scale", "absmax"],
        ["--percdamp", "0.05"],
        ["--no-activation-order"],
        ["--no-route-weight"],
    ],
)
def test_each_option_changes_the_head(option, original, base, calibration, good, tmp_path):
    dst = str(tmp_path / "dst")
    arguments = ["mtp", str(original), str(base), dst, "--calibration", str(calibration)]
    assert main([*arguments, *option]) == 0
    assert digest(Path(dst))[SHARD] != digest(good)[SHARD]


def test_experts_per_step_changes_memory_not_the_result(
    original, base, calibration, good, tmp_path
):
    dst = tmp_path / "dst"
    arguments = ["mtp", str(original), str(base), str(dst), "--calibration", str(calibration)]
    assert main([*arguments, "--experts-per-step", "7", "--files", "copy"]) == 0
    assert digest(dst)[SHARD] == digest(good)[SHARD]
    shard = "model-00001-of-00001.safetensors"
    assert not (dst / shard).samefile(base / shard)
    linked = tmp_path / "linked"
    assert main(["mtp", str(original), str(base), str(linked), "--rtn", "--files", "symbolic"]) == 0
    assert (linked / shard).is_symlink()


def test_what_quantization_lost_from_the_config_is_restored(original, base, tmp_path):
    lost = copy_of(base, tmp_path / "lost")
    keys = ("topk_method", "num_hash_layers", "rope_scaling", "num_nextn_predict_layers")
    keys += ("swiglu_limit", "torch_dtype", "hidden_size")
    edit_config(lost, lambda c: [c.pop(key) for key in keys])
    edit_config(lost, lambda c: c.update(compress_ratios=c["compress_ratios"][:-1]))
    dst = tmp_path / "dst"
    assert main(["mtp", str(original), str(lost), str(dst), "--rtn"]) == 0
    config, source = (json.loads((f / CONFIG).read_text()) for f in (dst, original))
    for key in (*keys, "compress_ratios"):
        assert config[key] == source[key]


@pytest.mark.parametrize("said", ["fp4", "bf16", None])
def test_the_result_says_int4_whatever_the_base_said_of_its_experts(said, original, base, tmp_path):
    other = copy_of(base, tmp_path / "other")
    edit_config(other, lambda c: c.pop("expert_dtype"))
    if said is not None:
        edit_config(other, lambda c: c.update(expert_dtype=said))
    dst = tmp_path / "dst"
    assert main(["mtp", str(original), str(other), str(dst), "--rtn"]) == 0
    assert json.loads((dst / CONFIG).read_text())["expert_dtype"] == "int4"


def test_the_shards_with_the_head_are_enough_of_the_original(original, base, good, tmp_path):
    part = copy_of(original, tmp_path / "part")
    names = json.loads((part / INDEX).read_text())["weight_map"]
    holding = {shard for name, shard in names.items() if name.startswith("mtp.")}
    gone = set(names.values()) - holding
    assert gone
    for shard in gone:
        (part / shard).unlink()
    assert main(["mtp", str(part), str(base), str(tmp_path / "dst"), "--rtn"]) == 0
    assert main(["verify", str(good), "--deep", str(part)]) == 0


def test_places_for_the_result_that_are_refused(original, base, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for dst, message in (
        (tmp_path / "there", "exists"),
        (base / "inside", "which is only read"),
        (base, "which is only read"),
    ):
        assert main(["mtp", str(original), str(base), str(dst), "--rtn"]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "x").touch()
    assert main(["mtp", str(original), str(base), str(tmp_path / "new"), "--rtn"]) == 2
    assert "other inputs or options" in capsys.readouterr().err


def test_a_hard_link_that_cannot_be_made_is_refused(original, base, tmp_path, monkeypatch, capsys):
    def no_link(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(mtp.os, "link", no_link)
    assert main(["mtp", str(original), str(base), str(tmp_path / "dst"), "--rtn"]) == 2
    assert "pass --files copy" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--percdamp", "0"], "percdamp = 0.0"),
        (["--experts-per-step", "0"], "experts_per_step = 0"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_options_are_refused(options, message, original, base, tmp_path, capsys):
    arguments = ["mtp", str(original), str(base), str(tmp_path / "dst"), "--rtn"]
    assert main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_calibration_or_rtn_is_needed(original, base, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["mtp", str(original), str(base), str(tmp_path / "dst")])


# ------------------------------------------------------------------------- verify, inspect


def test_the_good_checkpoint_is_sound_and_vllm_agrees(good, original, capsys):
    assert main(["verify", str(good), "--deep", str(original)]) == 0
    out = capsys.readouterr().out
    assert "178 tensors" in out
    assert "weight error against rounding to nearest" in out
    assert out.endswith("sound\n")


def test_vllm_and_our_reading_of_the_targets_agree(good):
    pytest.importorskip("vllm")
    config = json.loads((good / CONFIG).read_text())
    assert matching.vllm_faults(config) == []
    config["quantization_config"]["config_groups"]["experts"]["targets"] = [
        r"re:.*layers\.[0-3]\.ffn\.experts\.\d+\.w[123]$"
    ]
    ours, theirs = matching.static_faults(config), matching.vllm_faults(config)
    assert len(ours) == len(theirs) == 3
    assert all("ffn.experts.0" in fault for fault in ours + theirs)


def test_without_vllm_a_line_says_so_and_our_reading_remains(good, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    report = verify.check(scan(good))
    assert report.faults == []
    assert "target matching: skipped: vllm not installed" in report.notes
    folder = copy_of(good, tmp_path / "broken")
    edit_config(folder, lambda c: c["quantization_config"].update(ignore=[r"re:.*layers\.4\..*"]))
    faults = verify.check(scan(folder)).faults
    assert len(faults) == 7
    assert all(fault.startswith("config.json: the targets give ") for fault in faults)


def swap_experts(values: dict) -> None:
    for leaf in ("weight_packed", "weight_scale"):
        a, b = (f"mtp.0.ffn.experts.{e}.w1.{leaf}" for e in (2, 3))
        values[a], values[b] = values[b], values[a]


def halve_scales(values: dict) -> None:
    values["mtp.0.ffn.experts.4.w2.weight_scale"] /= 2


def flip_fp8(values: dict) -> None:
    values["mtp.0.attn.wkv.weight"].view(torch.uint8)[0, 0] ^= 1


def nudge_gate(values: dict) -> None:
    values["mtp.0.ffn.gate.weight"][0, 0] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_experts, "experts.2.w1: its values differ from the original's by"),
        (halve_scales, "experts.4.w2: its values differ"),
        (flip_fp8, "mtp.0.attn.wkv.weight: differs from the original"),
        (nudge_gate, "mtp.0.ffn.gate.weight: differs from the original"),
    ],
)
def test_deep_finds_what_headers_do_not_show(change, message, good, original, tmp_path, capsys):
    folder = copy_of(good, tmp_path / "broken")
    edit_tensors(folder, "mtp.0.norm.weight", change)
    assert main(["verify", str(folder)]) == 0
    assert main(["verify", str(folder), "--deep", str(original)]) == 1
    assert message in capsys.readouterr().out


def test_an_fp8_compressor_is_noted_and_refused_for_stock_vllm(good, tmp_path, capsys):
    folder = copy_of(good, tmp_path / "published")
    stem = "layers.1.attn.compressor.wkv"

    def to_fp8(values: dict) -> None:
        values[f"{stem}.weight"] = values[f"{stem}.weight"].to(torch.float8_e4m3fn)
        rows, columns = values[f"{stem}.weight"].shape
        values[f"{stem}.weight_scale"] = torch.ones(-(-rows // 128), columns // 128)

    edit_tensors(folder, f"{stem}.weight", to_fp8)
    assert main(["verify", str(folder)]) == 0
    assert "1 compressor and indexer weights are FP8" in capsys.readouterr().out
    assert main(["verify", str(folder), "--stock-vllm"]) == 1
    assert f"{stem}.weight_scale: stock vLLM" in capsys.readouterr().out


def test_names_that_published_bases_have_are_accepted(good, tmp_path):
    """Router bias under Transformers' name, FP32 tensors in BF16, the aliases of the head."""
    folder = copy_of(good, tmp_path / "published")

    def change(values: dict) -> None:
        name = "layers.1.ffn.gate.bias"
        values["layers.1.ffn.gate.e_score_correction_bias"] = values.pop(name).bfloat16()
        values["layers.1.hc_attn_fn"] = values["layers.1.hc_attn_fn"].bfloat16()
        values["mtp.0.emb.tok_emb.weight"] = values["embed.weight"].clone()

    edit_tensors(folder, "layers.1.ffn.gate.bias", change)
    assert verify.check(scan(folder)).faults == []


@pytest.mark.parametrize(
    ("which", "status", "line"),
    [
        ("original", 0, "MTP head: original"),
        ("good", 0, "MTP head: W4A16"),
        ("base", 0, "MTP head: absent"),
    ],
)
def test_inspect_says_what_the_head_is(which, status, line, request, capsys):
    folder = request.getfixturevalue(which)
    assert main(["inspect", str(folder)]) == status
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == line
    assert "layers ffn.experts.w1." in out


def test_inspect_knows_a_bf16_head_and_the_reasons_of_a_broken_one(good, tmp_path, capsys):
    folder = copy_of(good, tmp_path / "bf16")
    config = json.loads((folder / CONFIG).read_text())

    def to_bf16(values: dict) -> None:
        values.clear()
        for spec in head_tensors(config, Layout.BF16).values():
            dtype = torch.float32 if spec.dtypes == ("F32",) else torch.bfloat16
            values[spec.name] = torch.zeros(spec.shape, dtype=dtype)

    edit_tensors(folder, "mtp.0.norm.weight", to_bf16)
    assert main(["inspect", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "MTP head: BF16"
    edit_tensors(folder, "mtp.0.norm.weight", lambda v: v.pop("mtp.0.ffn.gate.bias"))
    assert main(["inspect", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "MTP head: broken (nearest: BF16)",
        "  mtp.0.ffn.gate.bias: is missing",
    ]
    edit_config(folder, lambda c: c.update(dspark_block_size=5))
    assert main(["inspect", str(folder)]) == 1
    assert "DSpark" in capsys.readouterr().out


# ------------------------------------------------------------------------------ small parts


def test_calibration_rows_come_back_by_expert_and_resume_where_they_stopped(tmp_path):
    hidden, ids, weights = calibration_rows(500)
    folder = tmp_path / "rows"
    writer = CalibrationWriter(folder, 10**9, rows_per_file=100)
    for start in range(0, 230, 23):
        assert writer.append(*(t[start : start + 23] for t in (hidden, ids, weights)))
    writer.flush(prompts=10)
    writer.append(hidden[:150], ids[:150], weights[:150])  # a file, and no meta.json: a killed run
    again = CalibrationWriter(folder, 10**9, rows_per_file=100)
    assert (again.num_rows, again.meta["prompts"]) == (230, 10)
    again.append(hidden[230:], ids[230:], weights[230:])
    again.flush(prompts=20)
    rows = Calibration(folder, HIDDEN, NUM_EXPERTS, TOPK)
    assert rows.num_rows == 500
    for expert in range(NUM_EXPERTS):
        row, slot = (ids == expert).nonzero(as_tuple=True)
        found, route = rows.rows_of(expert)
        assert torch.equal(found, hidden[row].bfloat16())
        assert torch.equal(route, weights[row, slot])
    assert torch.equal(rows.sample(5), hidden[[0, 100, 200, 300, 400]].bfloat16())
    assert len(rows.sample(10_000)) == 500


def test_the_writer_stops_at_its_budget_and_goes_on_with_a_larger_one(tmp_path):
    folder = tmp_path / "rows"
    part = calibration_rows(100)
    budget = 3 * 100 * (HIDDEN * 2 + TOPK * 8)
    writer = CalibrationWriter(folder, budget, rows_per_file=100)
    taken = [writer.append(*part) for _ in range(5)]
    assert taken == [True, True, False, False, False]  # the files' headers count too
    writer.flush()
    size = sum(path.stat().st_size for path in folder.glob("rows-*"))
    assert size <= budget
    assert Calibration(folder, HIDDEN, NUM_EXPERTS, TOPK).meta["full"] is True
    assert not CalibrationWriter(folder, budget).append(*part)
    assert CalibrationWriter(folder, 2 * budget).append(*part)


def test_check_sizes_refuses_widths_that_cannot_be_quantized():
    with pytest.raises(BadInput, match="moe_intermediate_size = 100 is not a multiple of 128"):
        check_sizes({**FLASH, "moe_intermediate_size": 100})
    with pytest.raises(BadInput, match="compress_ratios ends in 4"):
        check_sizes({**FLASH, "compress_ratios": [0] * 43 + [4]})


def test_a_shard_refuses_what_its_header_does_not_say(tmp_path):
    writer = ShardWriter(tmp_path / "x.safetensors", {"a": ("F32", (2,)), "b": ("I8", (3,))})
    with pytest.raises(ValueError, match="a is torch.float16"):
        writer.write("a", torch.zeros(2, dtype=torch.float16))
    writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="b was never written"):
        writer.close()
    writer.write("b", torch.arange(3, dtype=torch.int8))
    writer.close()
    read = load_file(tmp_path / "x.safetensors")
    assert read["a"].tolist() == [1, 1]
    assert read["b"].tolist() == [0, 1, 2]


class TestWholeFiles:
    """A file has its name when it is whole, not before: here its renaming is where all ends."""

    @pytest.fixture(autouse=True)
    def _no_renaming(self, monkeypatch):
        def replace(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "replace", replace)

    def test_json(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            writing.write_json(tmp_path / "x.json", {"a": 1})
        assert not (tmp_path / "x.json").exists()

    def test_tensors(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            writing.write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})
        assert not (tmp_path / "x.safetensors").exists()

    def test_a_shard_and_nothing_is_left_of_one_that_failed(self, tmp_path):
        specs = {"a": ("F32", (2,))}
        with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "x", specs) as writer:
            writer.write("a", torch.ones(2))
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "x", specs):
            _ = 1 / 0
        assert list(tmp_path.iterdir()) == []

    def test_a_copy(self, base, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            mtp.link_files(base, tmp_path, mtp.Files.COPY)
        assert not {path.name for path in tmp_path.iterdir()} & {p.name for p in base.iterdir()}


def test_progress_shows_the_time_left():
    stream = io.StringIO()
    progress = Progress("experts", 8, done=2, stream=stream)
    progress.step(3)
    assert progress.line(30.0).endswith("5/8, 0:30 passed, 0:30 left")
    progress.step(3)
    assert stream.getvalue().endswith("8/8, 0:00 passed, 0:00 left\n")
    assert duration(3725) == "1:02:05"


def test_int4_of_the_formats_module_is_what_rounding_packs():
    from retrofit import gptq, pack

    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    packed, scale, shape = quantize_int4(weight)
    chosen = gptq.absmax_scale(weight)
    ours = pack.expert_tensors("x", gptq.round_to_nearest(weight, chosen), chosen)
    assert torch.equal(ours["x.weight_packed"], packed)
    assert torch.equal(ours["x.weight_scale"], scale)
    assert torch.equal(ours["x.weight_shape"], shape)


def test_rows_of_the_right_layer_are_taken(original, base, tmp_path):
    rows = write_calibration(tmp_path / "rows", layers=[3, HEAD_LAYER])
    dst = tmp_path / "dst"
    arguments = ["mtp", str(original), str(base), str(dst), "--calibration", str(rows)]
    assert main(arguments) == 0
