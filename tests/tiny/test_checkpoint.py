import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tiny import export, load
from tiny.__main__ import CHECKPOINT, main
from tiny.config import TinyConfig
from tiny.export import Layout
from tiny.model import DeepseekV4

MAX_CHECKPOINT_BYTES = 25e6

HIDDEN, INTER, HEADS, HEAD_DIM = 256, 256, 4, 512


def fp8(name, out_features, in_features):
    return {
        f"{name}.weight": ("F8_E4M3", [out_features, in_features]),
        f"{name}.scale": ("F8_E8M0", [out_features // 128, in_features // 128]),
    }


def fp4(name, out_features, in_features):
    return {
        f"{name}.weight": ("I8", [out_features, in_features // 2]),
        f"{name}.scale": ("F8_E8M0", [out_features, in_features // 32]),
    }


def compressor(name, ratio, head_dim):
    width = head_dim * (2 if ratio == 4 else 1)
    return {
        f"{name}.wkv.weight": ("BF16", [width, HIDDEN]),
        f"{name}.wgate.weight": ("BF16", [width, HIDDEN]),
        f"{name}.norm.weight": ("BF16", [head_dim]),
        f"{name}.ape": ("F32", [ratio, width]),
    }


def block(p, ratio, is_hash):
    expected = {
        f"{p}.attn_norm.weight": ("BF16", [HIDDEN]),
        f"{p}.ffn_norm.weight": ("BF16", [HIDDEN]),
        f"{p}.attn.q_norm.weight": ("BF16", [128]),
        f"{p}.attn.kv_norm.weight": ("BF16", [HEAD_DIM]),
        f"{p}.attn.attn_sink": ("F32", [HEADS]),
        f"{p}.ffn.gate.weight": ("BF16", [16, HIDDEN]),
        **fp8(f"{p}.attn.wq_a", 128, HIDDEN),
        **fp8(f"{p}.attn.wq_b", HEADS * HEAD_DIM, 128),
        **fp8(f"{p}.attn.wkv", HEAD_DIM, HIDDEN),
        **fp8(f"{p}.attn.wo_a", 256, 1024),
        **fp8(f"{p}.attn.wo_b", HIDDEN, 256),
    }
    for kind in ("attn", "ffn"):
        expected[f"{p}.hc_{kind}_fn"] = ("F32", [24, 4 * HIDDEN])
        expected[f"{p}.hc_{kind}_base"] = ("F32", [24])
        expected[f"{p}.hc_{kind}_scale"] = ("F32", [3])
    if is_hash:
        expected[f"{p}.ffn.gate.tid2eid"] = ("I64", [2048, 2])
    else:
        expected[f"{p}.ffn.gate.bias"] = ("F32", [16])
    for w in ("w1", "w2", "w3"):
        expected |= fp8(f"{p}.ffn.shared_experts.{w}", INTER, HIDDEN)
        for e in range(16):
            expected |= fp4(f"{p}.ffn.experts.{e}.{w}", INTER, HIDDEN)
    if ratio:
        expected |= compressor(f"{p}.attn.compressor", ratio, HEAD_DIM)
    if ratio == 4:
        expected |= fp8(f"{p}.attn.indexer.wq_b", 4 * 128, 128)
        expected[f"{p}.attn.indexer.weights_proj.weight"] = ("BF16", [4, HIDDEN])
        expected |= compressor(f"{p}.attn.indexer.compressor", 4, 128)
    return expected


def hc_head(p):
    return {
        f"{p}hc_head_fn": ("F32", [4, 4 * HIDDEN]),
        f"{p}hc_head_base": ("F32", [4]),
        f"{p}hc_head_scale": ("F32", [1]),
    }


def expected_original():
    expected = {
        "embed.weight": ("BF16", [2048, HIDDEN]),
        "head.weight": ("BF16", [2048, HIDDEN]),
        "norm.weight": ("BF16", [HIDDEN]),
        **hc_head(""),
        **hc_head("mtp.0."),
        **fp8("mtp.0.e_proj", HIDDEN, HIDDEN),
        **fp8("mtp.0.h_proj", HIDDEN, HIDDEN),
        **{f"mtp.0.{n}.weight": ("BF16", [HIDDEN]) for n in ("enorm", "hnorm", "norm")},
    }
    for layer, ratio in enumerate((0, 4, 128, 4)):
        expected |= block(f"layers.{layer}", ratio, is_hash=layer == 0)
    return expected | block("mtp.0", 0, is_hash=False)


def stored(folder):
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found


def test_original_layout_has_exactly_these_names_dtypes_and_shapes(random_checkpoint):
    assert stored(random_checkpoint) == expected_original()
    assert set(export.read_index(random_checkpoint)) == set(expected_original())


def test_config_json_says_what_the_engine_needs(random_checkpoint):
    config = json.loads((random_checkpoint / "config.json").read_text())
    assert config["topk_method"] == "noaux_tc"
    assert config["compress_ratios"] == [0, 4, 128, 4, 0]
    assert config["expert_dtype"] == "fp4"
    assert config["quantization_config"]["weight_block_size"] == [128, 128]


def test_loading_gives_back_the_quantized_model_exactly(random_checkpoint, tiny_config):
    torch.manual_seed(0)
    trained = DeepseekV4(tiny_config).eval().requires_grad_(False)
    trained.set_quantization(weights=True, caches=True)
    tokens = torch.arange(100)[None]
    loaded = load.load(random_checkpoint)
    assert torch.equal(loaded(tokens), trained(tokens))


def test_exporting_a_loaded_model_keeps_every_value(random_checkpoint, tmp_path):
    again, model = tmp_path / "again", load.load(random_checkpoint)
    export.export(model, again)
    copy = load.load(again)
    for (name, a), b in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not list(tmp_path.glob("*.tmp"))


def test_w4a16_layout(random_checkpoint, tmp_path):
    model, folder = load.load(random_checkpoint), tmp_path / "w4a16"
    export.export(model, folder, Layout.W4A16)
    found = stored(folder)
    expert = "mtp.0.ffn.experts.3.w2"
    assert found[f"{expert}.weight_packed"] == ("I32", [256, 32])
    assert found[f"{expert}.weight_scale"] == ("BF16", [256, 2])
    assert found[f"{expert}.weight_shape"] == ("I64", [2])
    assert found["layers.1.attn.wq_b.weight_scale"] == ("F32", [16, 1])
    assert found["layers.1.attn.indexer.wq_b.weight_scale"] == ("F32", [4, 1])
    for name in ("mtp.0.e_proj", "layers.0.ffn.shared_experts.w1", "layers.1.attn.compressor.wkv"):
        assert found[f"{name}.weight"][0] == "BF16"
        assert f"{name}.weight_scale" not in found
    assert not any(n.endswith(".scale") for n in found)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {g["format"] for g in groups["config_groups"].values()} == {
        "float-quantized",
        "pack-quantized",
    }
    again = load.load(folder)
    ours, theirs = model.layers[1].attn.wq_b.weight, again.layers[1].attn.wq_b.weight
    assert torch.equal(ours, theirs)
    error = (model.mtp[0].block.ffn.experts.w1 - again.mtp[0].block.ffn.experts.w1).abs()
    assert 0 < error.max() < 0.05


def test_shuffling_moves_every_mtp_expert_and_nothing_else(random_checkpoint, tmp_path):
    shuffled = tmp_path / "shuffled"
    export.shuffle_mtp_experts(random_checkpoint, shuffled, seed=1)
    assert stored(shuffled) == stored(random_checkpoint)
    before, after = load.read_tensors(random_checkpoint), load.read_tensors(shuffled)
    for name, tensor in before.items():
        same = torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))
        is_expert = name.startswith("mtp.0.ffn.experts.") and name.endswith(".weight")
        assert same != is_expert or name.endswith(".scale")
    load.load(shuffled)


@pytest.mark.parametrize("layout", Layout)
def test_repeating_the_index_heads_keeps_the_model(layout, tmp_path):
    """Scores of all keys grow by the same factor, sqrt(2), which selects the same ones."""
    export.export(load.load(CHECKPOINT), tmp_path / "model", layout, tokenizer=CHECKPOINT)
    export.repeat_index_heads(tmp_path / "model", tmp_path / "wide", 2)
    models = [load.load(tmp_path / name) for name in ("model", "wide")]
    assert [model.config.index_n_heads for model in models] == [4, 8]
    x = torch.randn(1, 48, HIDDEN, generator=torch.Generator().manual_seed(0))
    latent, positions = x[..., :128], torch.arange(48)
    scores = []
    for model in models:
        attn = model.layers[1].attn
        scores.append(attn.indexer(x, latent, positions, attn.rope, True))
    assert torch.allclose(scores[1], scores[0] * 2**0.5, rtol=1e-5, atol=1e-5)
    tokens = torch.arange(100, 148)[None]
    assert torch.equal(*(model(tokens, torch.float32) for model in models))


@pytest.fixture
def broken(random_checkpoint, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(random_checkpoint, folder)
    return folder


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder .*nowhere does not exist"):
        load.load(tmp_path / "nowhere")


def test_a_missing_shard_is_refused(broken):
    (broken / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002.*the index names it"):
        load.load(broken)


def test_a_truncated_shard_is_refused(broken):
    shard = broken / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model-00001.*is damaged"):
        load.load(broken)


def test_a_missing_tensor_is_refused(broken):
    path = broken / export.INDEX
    index = json.loads(path.read_text())
    del index["weight_map"]["mtp.0.ffn.experts.7.w2.scale"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"unexpected \['mtp.0.ffn.experts.7.w2.scale'\]"):
        load.load(broken)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llama", "model_type = 'llama'"),
        ("compress_ratios", [0, 4], "compress_ratios"),
        ("hidden_size", 200, "hidden_size = 200 is not a multiple of 128"),
        ("vocab_size", 1024, "embed.weight has shape"),
    ],
)
def test_a_wrong_config_is_refused(broken, key, value, message):
    path = broken / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=message):
        load.load(broken)


def test_a_config_without_a_needed_key_is_refused():
    data = TinyConfig().to_dict()
    del data["topk_method"]
    with pytest.raises(ValueError, match="keys are missing: topk_method"):
        TinyConfig.from_dict(data)


def test_the_command_line_exports_and_refuses(random_checkpoint, tmp_path, capsys):
    out = tmp_path / "control"
    arguments = ["export", "--checkpoint", str(random_checkpoint), "--out", str(out)]
    assert main([*arguments, "--shuffle-mtp-experts"]) == 0
    assert json.loads(capsys.readouterr().out)["mtp_tensors"] == 135
    assert main(["info", "--checkpoint", str(tmp_path / "nowhere")]) == 1
    assert "error: checkpoint:" in capsys.readouterr().err


@pytest.mark.skipif(
    not list(CHECKPOINT.glob("*.safetensors")), reason="no trained checkpoint in this tree"
)
def test_the_committed_checkpoint_is_complete_and_small():
    assert sum(p.stat().st_size for p in CHECKPOINT.iterdir()) <= MAX_CHECKPOINT_BYTES
    assert stored(CHECKPOINT) == expected_original()
    assert len({*export.read_index(CHECKPOINT).values()}) == export.NUM_SHARDS
    names = {p.name for p in CHECKPOINT.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    for tensor in load_file(CHECKPOINT / "model-00001-of-00002.safetensors").values():
        if tensor.dtype in (torch.float32, torch.bfloat16):
            assert torch.isfinite(tensor).all()
