"""Broken checkpoints and calibrations: `verify` and `mtp` name the fault and leave nothing behind.

Each case is the good checkpoint with one thing changed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit.__main__ import main
from retrofit.calibration import META, rows_file
from retrofit.mtp import SHARD
from tests.retrofit.folders import (
    HEAD_LAYER,
    calibration_rows,
    config,
    copy_of,
    digest,
    edit_config,
    edit_index,
    edit_json,
    edit_tensors,
    group,
    weights,
    write_calibration,
)

E7 = "mtp.0.ffn.experts.7.w2"
NORM = "mtp.0.norm.weight"
TRUNK = "layers.1.attn.q_norm.weight"


def tensors(change):
    """Change the head's shard."""
    return lambda folder: edit_tensors(folder, NORM, change)


def rename(old: str, new: str):
    """Rename the head's tensors by regular expression."""

    def change(values: dict) -> None:
        for name in list(values):
            if (renamed := re.sub(old, new, name)) != name:
                values[renamed] = values.pop(name)

    return tensors(change)


def drop(pattern: str):
    def change(values: dict) -> None:
        for name in [n for n in values if re.search(pattern, n)]:
            del values[name]

    return tensors(change)


def replace(name: str, make):
    return tensors(lambda values: values.update({name: make(values[name])}))


def rewrite(name: str, change):
    """Change the bytes of a file (never through its hard link)."""

    def act(folder: Path) -> None:
        data = change((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).write_bytes(data)

    return act


def second_copy(folder: Path) -> None:
    """One of the head's tensors once more, in another listed shard."""
    norm = load_file(folder / SHARD)[NORM]
    save_file({NORM: norm, "extra": torch.zeros(1)}, folder / "model-extra.safetensors")
    edit_index(folder, lambda m: m.update({"extra": "model-extra.safetensors"}))


def unlist_shard(folder: Path) -> None:
    edit_index(folder, lambda m: [m.pop(n) for n in list(m) if m[n] == SHARD])


def original_head(values: dict) -> None:
    """An FP4 expert in the place of an INT4 one."""
    for leaf in ("packed", "scale", "shape"):
        del values[f"{E7}.weight_{leaf}"]
    values[f"{E7}.weight"] = torch.zeros(256, 128, dtype=torch.int8)
    values[f"{E7}.scale"] = torch.ones(256, 8).to(torch.float8_e8m0fnu)


def fp8_e_proj(values: dict) -> None:
    values["mtp.0.e_proj.weight"] = values["mtp.0.e_proj.weight"].to(torch.float8_e4m3fn)
    values["mtp.0.e_proj.weight_scale"] = torch.ones(2, 2)


def bf16_wq_a(values: dict) -> None:
    del values["mtp.0.attn.wq_a.weight_scale"]
    values["mtp.0.attn.wq_a.weight"] = values["mtp.0.attn.wq_a.weight"].float().bfloat16()


def dspark(settings: dict) -> None:
    settings["dspark_block_size"] = 5
    settings["compress_ratios"] = [*settings["compress_ratios"], 0, 0]


def one_target(*targets: str):
    return group("experts", targets=list(targets))


SCALE = "mtp.0.attn.wq_a.weight_scale"
# name -> (change, what the message must hold)
BROKEN = {
    "tensor missing": (drop(rf"{re.escape(E7)}\.weight_scale"), f"{E7}.weight_scale: is missing"),
    "shape tensor missing": (drop(r"7\.w2\.weight_shape"), f"{E7}.weight_shape: is missing"),
    "expert missing": (drop(r"experts\.3\."), "mtp.0.ffn.experts.3.w1.weight_packed: is missing"),
    "all experts missing": (drop(r"experts\.\d"), "experts.15.w3.weight_scale: is missing"),
    "all w1 misnamed": (
        rename(r"(experts\.\d+)\.w1\.weight_packed", r"\1.w1.qweight"),
        "experts.0.w1.weight_packed: is missing",
    ),
    "expert beyond the last": (rename(r"experts\.7\.", "experts.16."), "experts.16.w1"),
    "norm renamed": (rename(r"mtp\.0\.norm\.weight", "mtp.0.norm.gain"), "norm.gain: is not exp"),
    "second MTP layer": (rename(r"mtp\.0\.hnorm", "mtp.1.hnorm"), "one MTP layer is read"),
    "truncated": (rewrite(SHARD, lambda data: data[:-100]), "truncated"),
    "truncated in its header": (rewrite(SHARD, lambda data: data[:100]), "truncated"),
    "empty file": (rewrite(SHARD, lambda data: b""), "truncated"),
    "bytes too many": (rewrite(SHARD, lambda data: data + b"abc"), "too long"),
    "header of garbage": (
        rewrite(SHARD, lambda data: data[:8] + b"x" * 40 + data[48:]),
        "not safetensors",
    ),
    "expert scale float32": (
        replace(f"{E7}.weight_scale", lambda t: t.float()),
        f"{E7}.weight_scale: dtype F32; must be BF16",
    ),
    "packed words transposed": (
        replace(f"{E7}.weight_packed", lambda t: t.t().contiguous()),
        f"{E7}.weight_packed: shape [32, 256]; must be [256, 32]",
    ),
    "packed words of int64": (replace(f"{E7}.weight_packed", lambda t: t.long()), "dtype I64"),
    "U8 scales": (
        replace(SCALE, lambda t: t.to(torch.float8_e8m0fnu).view(torch.uint8)),
        "wq_a.weight_scale: dtype U8; must be F32 or F8_E8M0; exponents typed as numbers load as",
    ),
    "exponents as floats": (
        replace(SCALE, lambda t: t.to(torch.float8_e8m0fnu).view(torch.uint8).float()),
        "exponents, copied as numbers",
    ),
    "_inv names": (
        rename(r"(attn\..*)\.weight_scale", r"\1.weight_scale_inv"),
        "wq_a.weight_scale_inv: is not expected; the scale is called `weight_scale`",
    ),
    ".scale names": (
        rename(r"(attn\..*)\.weight_scale", r"\1.scale"),
        "wq_a.scale: is not expected; the scale is called `weight_scale`",
    ),
    "model. prefix": (rename(r"^mtp", "model.mtp"), "names have no `model.` prefix"),
    "named as a layer": (rename(r"^mtp\.0", f"layers.{HEAD_LAYER}"), "begin with `mtp.0.`"),
    "named as a model layer": (
        rename(r"^mtp\.0", f"model.layers.{HEAD_LAYER}"),
        "no `model.` prefix",
    ),
    "Transformers' expert names": (
        rename(r"(experts\.\d+)\.w1\.", r"\1.gate_proj."),
        "Transformers' expert names",
    ),
    "Transformers' shared expert names": (
        rename(r"shared_experts\.w2\.", "shared_experts.down_proj."),
        "shared_experts.w2.weight: is missing",
    ),
    "shard not in the index": (unlist_shard, f"does not list {SHARD}"),
    "index names an absent file": (
        lambda folder: (folder / SHARD).unlink(),
        f"names {SHARD}, which does not exist",
    ),
    "index names another shard": (
        lambda folder: edit_index(folder, lambda m: m.update({NORM: m["embed.weight"]})),
        f"{NORM} is in {SHARD}, not in",
    ),
    "index lists a tensor too many": (
        lambda folder: edit_index(folder, lambda m: m.update({"mtp.0.x": SHARD})),
        "mtp.0.x is not in",
    ),
    "index without a tensor": (
        lambda folder: edit_index(folder, lambda m: m.pop(NORM)),
        f"does not list {NORM}",
    ),
    "no index": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        "index.json: does not exist",
    ),
    "index not JSON": (rewrite("model.safetensors.index.json", lambda d: d[:50]), "not JSON"),
    "tensor in two files": (second_copy, f"{NORM}: in two files"),
    "router bias missing": (drop(r"gate\.bias"), "mtp.0.ffn.gate.bias: is missing"),
    "attention scale missing": (drop(r"wo_b\.weight_scale"), "wo_b.weight_scale: is missing"),
    "attention in BF16": (tensors(bf16_wq_a), "wq_a.weight: dtype BF16; must be F8_E4M3"),
    "e_proj in FP8": (tensors(fp8_e_proj), "e_proj.weight: dtype F8_E4M3; must be BF16"),
    "an FP4 expert": (tensors(original_head), f"{E7}.weight: is not expected"),
    "zero point": (
        tensors(lambda v: v.update({f"{E7}.weight_zero_point": torch.zeros(1)})),
        "the format is symmetric",
    ),
    "FP32 tensor in BF16": (
        replace("mtp.0.hc_attn_fn", lambda t: t.bfloat16()),
        "hc_attn_fn: dtype BF16; must be F32",
    ),
    "NaN scales": (
        replace(f"{E7}.weight_scale", lambda t: torch.full_like(t, torch.nan)),
        f"{E7}.weight_scale: holds NaN",
    ),
    "NaN norm": (replace(NORM, lambda t: t / 0 * 0), f"{NORM}: holds NaN"),
    "zero scales": (
        replace(f"{E7}.weight_scale", torch.zeros_like),
        f"{E7}.weight_scale: a scale is 0",
    ),
    "weight_shape of another": (
        replace(f"{E7}.weight_shape", lambda t: t * 2),
        f"{E7}.weight_shape: [512, 512]; must be [256, 256]",
    ),
    "group without format": (group("experts", format=None), "'experts' has format = None"),
    "format of the whole file": (group("attention", format="mixed-precision"), "mixed-precision"),
    "literal targets": (one_target("mtp.0.ffn.experts.0.w1"), "never matches"),
    "targets on mtp": (one_target(r"re:.*mtp\..*experts.*"), "never matches"),
    "targets of the trunk's layers": (
        one_target(r"re:.*layers\.[0-3]\.ffn\.experts\.\d+\.w[123]$"),
        "give ffn.experts.0.w1 of the head 'none'",
    ),
    "targets in Transformers' names": (
        one_target(r"re:.*experts\.\d+\.(gate|up|down)_proj$"),
        "give ffn.experts.0.w1 of the head 'none'",
    ),
    "targets that take too much": (
        one_target(r"re:.*(experts\.\d+\.w[123]|e_proj|gate_up_proj)$"),
        "give e_proj of the head 'int4 group'",
    ),
    "target no regular expression": (one_target("re:(experts"), "no regular expression"),
    "head ignored": (
        config(lambda c: c["quantization_config"].update(ignore=[r"re:.*layers\.4\..*"])),
        "give attn.wq_b of the head 'none'",
    ),
    "actorder group": (weights("experts", actorder="group"), "actorder = 'group'"),
    "groups of 64": (weights("experts", group_size=64), "group_size = 64"),
    "asymmetric": (weights("experts", symmetric=False), "symmetric = False"),
    "no quantization_config": (config(lambda c: c.pop("quantization_config")), "is missing"),
    "quantization of the original": (
        config(lambda c: c["quantization_config"].update(quant_method="fp8")),
        "quant_method = 'fp8'",
    ),
    "experts said to be FP4": (
        config(lambda c: c.update(expert_dtype="fp4")),
        "expert_dtype = 'fp4': vLLM takes the experts for FP4",
    ),
    "experts' dtype absent": (config(lambda c: c.pop("expert_dtype")), "expert_dtype = None"),
    "no topk_method": (config(lambda c: c.pop("topk_method")), "topk_method = None"),
    "no head in the config": (
        config(lambda c: c.update(num_nextn_predict_layers=0)),
        "num_nextn_predict_layers = 0",
    ),
    "DSpark": (config(dspark), "dspark_block_size is set: this is the DSpark variant"),
    "46 ratios, in proportion": (
        config(lambda c: c.update(compress_ratios=[*c["compress_ratios"], 0, 0])),
        "7 compress_ratios; num_hidden_layers + 1 (the MTP layer) = 5",
    ),
    "ratio of the head left out": (
        config(lambda c: c.update(compress_ratios=c["compress_ratios"][:-1])),
        "4 compress_ratios",
    ),
    "another model": (config(lambda c: c.update(model_type="llama")), "model_type = 'llama'"),
    "size missing": (config(lambda c: c.pop("hidden_size")), "hidden_size = None"),
    "config not JSON": (rewrite("config.json", lambda data: data[:20]), "config.json: not JSON"),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json: does not exist"),
    "no head": (drop("."), "the head is absent"),
    "trunk tensor missing": (
        lambda folder: edit_tensors(folder, TRUNK, lambda v: v.pop(TRUNK)),
        f"{TRUNK}: is missing",
    ),
    "trunk tensor of another shape": (
        lambda folder: edit_tensors(folder, TRUNK, lambda v: v.update({TRUNK: v[TRUNK][:5]})),
        f"{TRUNK}: shape [5]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_verify_names_the_fault(case, good, tmp_path, capsys):
    change, message = BROKEN[case]
    folder = copy_of(good, tmp_path / "broken")
    change(folder)
    assert main(["verify", str(folder)]) == 1
    faults = [li for li in capsys.readouterr().out.splitlines() if li.startswith("fault: ")]
    assert any(message in fault for fault in faults), faults[:5]


def test_every_fault_is_listed(good, tmp_path, capsys):
    folder = copy_of(good, tmp_path / "broken")
    drop(r"experts\.3\.")(folder)
    edit_config(folder, lambda c: c.pop("topk_method"))
    assert main(["verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert out.count("experts.3.") == 9
    assert "topk_method" in out
    assert "10 faults" in out


FP4 = "mtp.0.ffn.experts.7.w2.weight"


def source(change):
    return lambda source, base, rows: edit_tensors(source, FP4, change)


def in_base(name: str):
    """A case of BROKEN, done to the base."""
    return lambda source, base, rows: BROKEN[name][0](base)


def rows_changed(change, number: int = 0):
    def act(source: Path, base: Path, rows: Path) -> None:
        path = rows / rows_file(number)
        values = load_file(path)
        change(values)
        save_file(values, path)

    return act


def no_rows_for_expert_5(source: Path, base: Path, rows: Path) -> None:
    for path in rows.glob("rows-*"):
        values = load_file(path)
        ids = values["topk_ids"]
        ids[ids == 5] = torch.where(ids == 6, 7, 6).flip(1)[ids == 5].int()
        same = ids[:, 0] == ids[:, 1]
        ids[same, 1] = 8
        save_file(values, path)


def renamed(values: dict, old: str, new: str) -> None:
    values[new] = values.pop(old)


# name -> (change of source, base, rows; what the message must hold)
BROKEN_INPUT = {
    "source without an expert": (source(lambda v: v.pop(FP4)), f"{FP4}: is missing"),
    "source scale as U8": (
        source(lambda v: v.update({FP4[:-6] + "scale": v[FP4[:-6] + "scale"].view(torch.uint8)})),
        "dtype U8; must be F8_E8M0",
    ),
    "source scale NaN": (
        source(
            lambda v: v.update(
                {FP4[:-6] + "scale": torch.full((256, 8), torch.nan).to(torch.float8_e8m0fnu)}
            )
        ),
        "experts.7.w2.scale holds NaN",
    ),
    "source head in BF16": (
        source(lambda v: v.update({FP4: torch.zeros(256, 256, dtype=torch.bfloat16)})),
        "dtype BF16; must be I8",
    ),
    "source names in HF style": (
        source(lambda v: renamed(v, FP4, FP4.replace("w2", "down_proj"))),
        "w2.weight: is missing",
    ),
    "source is DSpark": (
        lambda source, base, rows: edit_config(source, dspark),
        "DSpark variant",
    ),
    "source of another size": (
        lambda source, base, rows: edit_config(base, lambda c: c.update(n_routed_experts=8)),
        "n_routed_experts = 8, and 16 in",
    ),
    "source config not JSON": (
        lambda source, base, rows: rewrite("config.json", lambda d: d[:9])(source),
        "not JSON",
    ),
    "source truncated": (
        lambda source, base, rows: rewrite("model-00002-of-00002.safetensors", lambda d: d[:-9])(
            source
        ),
        "truncated",
    ),
    "base with a head": (
        lambda source, base, rows: edit_tensors(
            base, TRUNK, lambda v: v.update({NORM: torch.ones(256)})
        ),
        "has a head already",
    ),
    "base without a tensor": (
        lambda source, base, rows: edit_tensors(base, TRUNK, lambda v: v.pop(TRUNK)),
        f"{TRUNK}: is missing",
    ),
    "base group without format": (in_base("group without format"), "has format = None"),
    "base with literal targets": (in_base("literal targets"), "never matches"),
    "base with targets of its layers": (
        in_base("targets of the trunk's layers"),
        "give ffn.experts.0.w1 of the head 'none'",
    ),
    "base with the head ignored": (in_base("head ignored"), "of the head 'none'"),
    "base with actorder group": (in_base("actorder group"), "actorder = 'group'"),
    "base without quantization": (in_base("no quantization_config"), "is missing"),
    "base is an original": (
        lambda source, base, rows: edit_tensors(
            base,
            TRUNK,
            lambda v: v.update({"layers.1.attn.wq_a.weight_scale": torch.ones(9, 9)}),
        ),
        "shape [9, 9]",
    ),
    "no rows": (lambda source, base, rows: (rows / META).unlink(), "meta.json: does not exist"),
    "rows of a later schema": (
        lambda source, base, rows: edit_json(rows / META, lambda m: m.update(schema_version=2)),
        "schema_version = 2",
    ),
    "rows file missing": (
        lambda source, base, rows: (rows / rows_file(1)).unlink(),
        "rows-00001.safetensors: does not exist",
    ),
    "rows miscounted": (
        lambda source, base, rows: edit_json(rows / META, lambda m: m.update(num_rows=5)),
        "meta.json says 5",
    ),
    "rows without a count": (
        lambda source, base, rows: edit_json(rows / META, lambda m: m.update(num_files="x")),
        "num_files = 'x'",
    ),
    "rows of another layer": (
        lambda source, base, rows: edit_json(rows / META, lambda m: m.update(layers=[3])),
        "the MTP head is layer 4",
    ),
    "rows of another width": (
        rows_changed(lambda v: v.update(hidden=v["hidden"][:, :128].contiguous())),
        "the model has hidden_size = 256",
    ),
    "rows in float32": (
        rows_changed(lambda v: v.update(hidden=v["hidden"].float())),
        "hidden is F32",
    ),
    "rows without weights": (rows_changed(lambda v: v.pop("topk_weights")), "are needed"),
    "rows that do not fit": (
        rows_changed(lambda v: v.update(topk_ids=v["topk_ids"][:-1].contiguous())),
        "do not fit each other",
    ),
    "expert id out of range": (
        rows_changed(lambda v: v["topk_ids"].fill_(16)),
        "topk_ids in [16, 16]; the model has 16",
    ),
    "expert twice in a row": (rows_changed(lambda v: v["topk_ids"].fill_(3)), "twice in a row"),
    "negative route weight": (rows_changed(lambda v: v["topk_weights"].neg_()), "negative"),
    "NaN row": (rows_changed(lambda v: v["hidden"][7].fill_(torch.nan)), "holds NaN"),
    "rows of zeros": (
        lambda source, base, rows: [
            rows_changed(lambda v: v["hidden"].zero_(), number)(source, base, rows)
            for number in (0, 1)
        ],
        "expert 0 ('w1', 'w3'): GPTQ: the damped Hessian is not positive definite",
    ),
    "expert without rows": (no_rows_for_expert_5, "no rows for 1 experts, the first is 5"),
}


@pytest.mark.parametrize("case", BROKEN_INPUT)
def test_mtp_refuses_with_one_line_and_leaves_nothing(case, original, base, tmp_path, capsys):
    change, message = BROKEN_INPUT[case]
    inputs = [copy_of(original, tmp_path / "source"), copy_of(base, tmp_path / "base")]
    inputs.append(write_calibration(tmp_path / "rows"))
    change(*inputs)
    before = [digest(folder) for folder in inputs]
    source, broken_base, rows = map(str, inputs)
    dst = tmp_path / "out" / "dst"
    dst.parent.mkdir()
    capsys.readouterr()
    assert main(["mtp", source, broken_base, str(dst), "--calibration", rows]) == 2
    error = [li for li in capsys.readouterr().err.splitlines() if li.startswith("retrofit: ")]
    assert len(error) == 1
    assert message in error[0]
    assert list(dst.parent.iterdir()) == []
    assert [digest(folder) for folder in inputs] == before


def test_an_expert_without_rows_is_rounded_when_asked(original, base, tmp_path, capsys):
    rows = write_calibration(tmp_path / "rows")
    no_rows_for_expert_5(original, base, rows)
    dst = tmp_path / "dst"
    arguments = ["mtp", str(original), str(base), str(dst), "--calibration", str(rows)]
    assert main([*arguments, "--allow-uncalibrated"]) == 0
    from retrofit.reading import read_json

    manifest = read_json(dst / "mtp_manifest.json")
    assert manifest["experts_with_few_rows"] == [5]
    record = manifest["tensors"]["mtp.0.ffn.experts.5.w1"]
    assert (record["method"], record["num_rows"]) == ("rtn-mse", 0)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_no_folder_and_no_weights_are_bad_input(command, tmp_path, capsys):
    assert main([command, str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert main([command, str(tmp_path)]) == 2
    assert "no *.safetensors file" in capsys.readouterr().err


def test_rows_that_a_writer_may_not_continue_are_refused(tmp_path):
    from retrofit.calibration import CalibrationWriter
    from retrofit.errors import BadInput

    folder = write_calibration(tmp_path / "rows")
    with pytest.raises(BadInput, match="model_sha256"):
        CalibrationWriter(folder, 10**9, meta={"model_sha256": "1"})
    (folder / META).unlink()
    with pytest.raises(BadInput, match=r"holds rows and no meta\.json"):
        CalibrationWriter(folder, 10**9)
    hidden, ids, weights = calibration_rows(10)
    writer = CalibrationWriter(tmp_path / "new", 10**9)
    with pytest.raises(BadInput, match="topk twice|rows, topk"):
        writer.append(hidden, ids[:5], weights)
    with pytest.raises(BadInput, match="budget_bytes = 0"):
        CalibrationWriter(tmp_path / "other", 0)
