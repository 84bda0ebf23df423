"""The generator of full-size checkpoints, at small sizes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from kernels.formats import dequantize_fp8_block, dequantize_int4
from scripts import make_full_size
from scripts.make_full_size import INDEX, FullSizeConfig, make, model_config
from serve.checkpoint import check_checkpoint
from serve.shapes import checkpoint_tensors, flash_config
from tiny import generate
from tiny import load as plain_model

SMALL = {
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "num_attention_heads": 8,
    "q_lora_rank": 128,
    "o_lora_rank": 128,
}
BASE = flash_config() | SMALL
OPTIONS = FullSizeConfig(layers=4)


def load(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("full-size")
    make(path, OPTIONS, BASE)
    return path


@pytest.fixture(scope="module")
def tensors(folder):
    return load(folder)


def test_names_types_and_shapes_are_those_of_the_layout(tensors):
    types = {
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.int32: "I32",
        torch.int64: "I64",
    }
    found = {name: (types[value.dtype], tuple(value.shape)) for name, value in tensors.items()}
    specs = checkpoint_tensors(model_config(OPTIONS, BASE))
    assert found == {spec.name: (spec.dtype, spec.shape) for spec in specs}


def test_the_server_s_preflight_accepts_it_and_each_layer_is_a_file(folder):
    check_checkpoint(folder, num_speculative_tokens=1)
    shards = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    assert len(shards) == 1 + 4 + 1 + 1  # embedding, layers, head, MTP
    assert not list(folder.glob(".*"))


def test_quantized_weights_keep_the_size_of_their_input(tensors):
    """A product with a vector of unit RMS has unit RMS."""
    for name, value in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            weight = dequantize_int4(
                value, tensors[f"{stem}.weight_scale"], tensors[f"{stem}.weight_shape"]
            )
        elif value.dtype == torch.float8_e4m3fn:
            weight = dequantize_fp8_block(value, tensors[f"{stem}.weight_scale"])
        else:
            continue
        assert weight.std() * weight.shape[1] ** 0.5 == pytest.approx(1, abs=0.05), name


def test_int4_weights_have_no_mean(tensors):
    """A mean is a common part of all outputs; it hides the rest at real sizes."""
    stems = [name.removesuffix(".weight_packed") for name in tensors if "weight_packed" in name]
    for stem in stems:
        parts = (tensors[f"{stem}.weight_{leaf}"] for leaf in ("packed", "scale", "shape"))
        weight = dequantize_int4(*parts)
        assert abs(weight.mean()) < 0.02 * weight.std(), stem


def test_an_intact_model_answers_the_next_token_and_its_head_drafts_it(tmp_path):
    """Through all layers of the plain model, wide enough that a common part would win."""
    wide = {"hidden_size": 2048, "vocab_size": 4096, "n_routed_experts": 4}
    make(tmp_path, OPTIONS, BASE | wide)
    model = plain_model.load(tmp_path)
    prompts = [[3000, 7, 1000, 11], [9, 2, 2000]]
    assert generate.greedy(model, prompts, 3, torch.float32) == [[12, 13, 14], [2001, 2002, 2003]]
    assert generate.acceptance(model, prompts, 1, 2, torch.float32).acceptance_rate == 1


def test_the_head_answers_the_next_token(tensors):
    """Without the layers: the embedding of t, through the output head, gives t + 1."""
    logits = tensors["embed.weight"].float() @ tensors["head.weight"].float().t()
    top = logits.topk(2, dim=-1)
    assert top.indices[:, 0].tolist() == [*range(1, 256), 0]
    assert (top.values[:, 0] - top.values[:, 1]).min() > 5


def test_the_draft_sees_the_embedding_and_less_of_the_hidden_state(tensors):
    assert torch.equal(tensors["mtp.0.e_proj.weight"].float(), torch.eye(512))
    assert tensors["mtp.0.h_proj.weight"].float().std() * 512**0.5 == pytest.approx(0.5, abs=0.02)


def test_hash_routing_gives_each_token_distinct_experts(tensors):
    table = tensors["layers.0.ffn.gate.tid2eid"]
    assert table.min() >= 0
    assert table.max() < 8
    assert (table.sort(-1).values.diff(dim=-1) > 0).all()
    assert table[:, 0].bincount(minlength=8).min() > 0


def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(folder, tmp_path):
    make(tmp_path / "same", OPTIONS, BASE)
    make(tmp_path / "other", FullSizeConfig(layers=4, seed=1), BASE)
    for path in folder.glob("*"):
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
    shard = "model-00002.safetensors"
    assert (tmp_path / "other" / shard).read_bytes() != (folder / shard).read_bytes()


def test_a_layer_s_weights_do_not_depend_on_how_many_there_are(tensors, tmp_path):
    make(tmp_path, FullSizeConfig(layers=3), BASE)
    name = "layers.1.ffn.experts.3.w2.weight_packed"
    assert torch.equal(load(tmp_path)[name], tensors[name])


def test_options_change_the_layout(tmp_path):
    make(tmp_path, FullSizeConfig(layers=3, mtp=False, fp8_compressor=True), BASE)
    names = load(tmp_path).keys()
    assert "layers.2.attn.compressor.wkv.weight_scale" in names
    assert not any(name.startswith("mtp.") for name in names)
    config = json.loads((tmp_path / "config.json").read_text())
    targets = config["quantization_config"]["config_groups"]["attention"]["targets"]
    assert any("compressor" in target for target in targets)


def test_the_config_has_the_first_layers_and_one_for_the_head():
    config = model_config(OPTIONS)
    assert config["compress_ratios"] == [0, 0, 4, 128, 0]
    assert config["num_hash_layers"] == 3
    assert model_config(FullSizeConfig(layers=2))["num_hash_layers"] == 1
    assert config["n_routed_experts"] == 256


@pytest.mark.parametrize(
    ("layers", "message"), [(0, "must be at least 1"), (44, "the model has 43")]
)
def test_a_bad_number_of_layers_is_refused(layers, message):
    with pytest.raises(ValueError, match=f"layers = {layers}; .*{message}"):
        model_config(FullSizeConfig(layers=layers))


def test_the_command_reports_what_it_wrote(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(make_full_size, "make", lambda folder, config: made.append(config))
    assert make_full_size.main(["--out", str(tmp_path), "--layers", "6", "--no-mtp"]) == 0
    assert made == [FullSizeConfig(layers=6, mtp=False)]
    with pytest.raises(SystemExit):
        make_full_size.main(["--out", str(tmp_path), "--layers", "0"])
