"""The record of what was loaded."""

import json
from types import SimpleNamespace

import pytest
from torch import nn

from kernels.load_record import ENV, LoadRecord, all_reduce_paths, describe, summary
from kernels.loading import LoadReport, Part


class Attention(nn.Module):
    pass


def model() -> nn.Module:
    fp8 = type("Fp8", (), {"fp8_linear": type("DeepGemm", (), {})()})
    layers = []
    for _ in range(2):
        attention = Attention()
        attention.wq_b = nn.Module()
        attention.wq_b.quant_method = object()
        attention.wq_b.scheme = fp8()
        layer = nn.Module()
        layer.attn = attention
        layer.experts = nn.Module()
        layer.experts.quant_method = type("Int4", (), {"experts_cls": type("Marlin", (), {})})()
        layers.append(layer)
    root = nn.Module()
    root.layers = nn.ModuleList(layers)
    return root


def group(**communicators) -> SimpleNamespace:
    return SimpleNamespace(world_size=2, device_communicator=SimpleNamespace(**communicators))


ENTRY = describe(
    model(),
    LoadReport(Part.TARGET, {"a", "b"}, 3, ["layers.1.attn.compressor.wkv"]),
    group(ca_comm=SimpleNamespace(disabled=True), pynccl_comm=SimpleNamespace(), qr_comm=None),
)


def test_modules_are_counted_by_role_scheme_and_kernel():
    assert ENTRY["modules"] == [
        {"module": "layers.*.attn.wq_b", "scheme": "Fp8", "kernel": "DeepGemm", "count": 2},
        {"module": "layers.*.experts", "scheme": "Int4", "kernel": "Marlin", "count": 2},
    ]
    assert ENTRY["attention"] == {"Attention": 2}
    assert (ENTRY["num_parameters"], ENTRY["num_tensors"]) == (2, 3)


def test_the_line_for_the_log_says_it_all():
    assert summary("target", ENTRY) == (
        "target loaded: 2 params from 3 tensors, none missing; attention Attention; 2 Fp8 "
        "(DeepGemm), 2 Int4 (Marlin); all-reduce SimpleNamespace, SimpleNamespace; "
        "1 FP8 weights dequantized to BF16"
    )


def test_a_disabled_or_absent_communicator_is_not_listed():
    used = group(ca_comm=SimpleNamespace(disabled=True), qr_comm=None)
    assert all_reduce_paths(used) == ["SimpleNamespace"]
    assert all_reduce_paths(SimpleNamespace(world_size=1)) == []


def test_the_file_grows_with_each_model_and_is_written_by_one_rank(tmp_path, monkeypatch):
    path = tmp_path / "load.json"
    monkeypatch.setenv(ENV, str(path))
    record = LoadRecord()
    record.add("target", {"num_tensors": 1}, write=True)
    record.add("draft", {"num_tensors": 2}, write=True)
    assert json.loads(path.read_text()) == {
        "schema_version": 1,
        "target": {"num_tensors": 1},
        "draft": {"num_tensors": 2},
    }
    path.unlink()
    record.add("draft", {}, write=False)
    assert list(tmp_path.iterdir()) == []


def test_without_the_variable_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(ENV, raising=False)
    monkeypatch.chdir(tmp_path)
    LoadRecord().add("target", {}, write=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv(ENV, str(tmp_path / "absent" / "load.json"))
    with pytest.raises(ValueError, match=f"{ENV} = .*its folder does not exist"):
        LoadRecord().add("target", {}, write=True)
