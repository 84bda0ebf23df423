"""Memory of a profile, from shapes alone."""

import json
import struct
import subprocess
import sys
from dataclasses import replace

import pytest

import serve.__main__ as cli
from serve.errors import CheckpointError, ConfigError, PlanError
from serve.plan import (
    CARD_MIB,
    GIB,
    MIB,
    fixed_buffers,
    make_plan,
    plan_profile,
    predicted_bytes,
    rank_weights,
    read_checkpoint,
    run_plan,
)
from serve.profiles import Device, load_profile, profile_names
from serve.shapes import TensorSpec, checkpoint_tensors, flash_config

CONFIG = flash_config()
PROFILE = load_profile("524k")
GPU_PROFILES = [name for name in profile_names() if load_profile(name).device is Device.CUDA]


@pytest.mark.parametrize(
    ("name", "max_model_len", "max_num_seqs"),
    [("524k", 524288, 2), ("256k", 262144, 4), ("128k", 131072, 8), ("128k-single", 131072, 1)],
)
def test_the_profiles_of_the_reference_results_fit(name, max_model_len, max_num_seqs):
    profile = load_profile(name)
    assert (profile.max_model_len, profile.max_num_seqs) == (max_model_len, max_num_seqs)
    plan, source = plan_profile(profile, None)
    assert plan.fits
    assert "bundled" in source


def test_the_shapes_are_those_of_the_published_checkpoints():
    tensors = list(checkpoint_tensors(CONFIG))
    head = [tensor for tensor in tensors if tensor.name.startswith("mtp.")]
    assert len(head) == 2338
    assert sum(tensor.num_bytes for tensor in head) == pytest.approx(3.552e9, rel=1e-3)
    base = list(checkpoint_tensors(CONFIG, mtp=False, fp8_compressor=True))
    assert len(base) == 100_652
    assert sum(tensor.name.endswith("weight_scale") for tensor in base) == 33_405
    assert sum(tensor.num_bytes for tensor in base) == pytest.approx(152.4e9, rel=1e-3)


def test_weights_are_cut_or_copied():
    tensors = [
        TensorSpec("layers.0.attn.wq_b.weight", "F8_E4M3", (10, 10)),
        TensorSpec("layers.3.ffn.experts.255.w2.weight_packed", "I32", (10, 10)),
        TensorSpec("layers.2.attn.indexer.wq_b.weight", "F8_E4M3", (10, 10)),
        TensorSpec("mtp.0.e_proj.weight", "BF16", (10, 10)),
    ]
    weights = rank_weights(tensors, 2)
    assert weights.sharded_bytes == (100 + 400) // 2
    assert weights.replicated_bytes == 100 + 200


def test_memory_differs_from_the_file_where_the_engine_converts():
    tensors = [
        TensorSpec("layers.2.attn.compressor.wkv.weight", "F8_E4M3", (10, 10)),  # to BF16
        TensorSpec("layers.2.attn.compressor.wkv.weight_scale", "F32", (1, 1)),  # then dropped
        TensorSpec("layers.0.ffn.gate.tid2eid", "I64", (10, 6)),  # to int32
        TensorSpec("mtp.0.head.weight", "F32", (10, 10)),  # the target's is shared
    ]
    assert rank_weights(tensors, 2).replicated_bytes == 200 + 240


def test_a_tensor_of_unknown_use_is_refused():
    with pytest.raises(CheckpointError, match="1 tensors of unknown use, the first x.weight"):
        rank_weights([TensorSpec("x.weight", "BF16", (1,))], 2)


def test_the_trunk_is_below_a_reported_load_by_less_than_the_allowance():
    """73.25 GiB a card at TP 2 without MTP; the rotary tables are part of that."""
    weights = rank_weights(checkpoint_tensors(CONFIG, mtp=False), 2)
    known = weights.total_bytes + fixed_buffers(CONFIG, PROFILE)["rotary tables"]
    allowance = predicted_bytes(CONFIG, PROFILE)["what a load takes beyond its shapes"]
    assert known < 73.25 * GIB < known + 1.1 * allowance


def test_everything_adds_up_to_what_may_be_used():
    plan, _ = plan_profile(PROFILE, None)
    assert plan.usable_bytes == int(CARD_MIB * MIB * 0.93)
    taken = plan.weights_sharded_bytes + plan.weights_replicated_bytes
    taken += sum(plan.buffers.values()) + sum(plan.predicted.values())
    assert plan.kv_bytes == plan.usable_bytes - taken
    assert plan.needed_blocks == plan.request_blocks + plan.window_blocks


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_model_len", 262144),
        ("max_num_seqs", 1),
        ("max_num_batched_tokens", 2048),
        ("num_speculative_tokens", 3),
        ("tensor_parallel_size", 4),
        ("gpu_memory_utilization", 0.9),
        ("enforce_eager", True),
    ],
)
def test_each_field_changes_the_plan(field, value):
    tensors = list(checkpoint_tensors(CONFIG))
    before = make_plan(PROFILE, CONFIG, tensors)
    after = make_plan(replace(PROFILE, **{field: value}), CONFIG, tensors)
    changed = {"kv_blocks", "needed_blocks"}
    assert any(getattr(before, name) != getattr(after, name) for name in changed)


def test_without_speculation_the_head_takes_no_memory():
    with_head, _ = plan_profile(PROFILE, None)
    without, _ = plan_profile(replace(PROFILE, num_speculative_tokens=0), None)
    assert with_head.weights_sharded_bytes - without.weights_sharded_bytes > 1.5 * GIB
    assert "hidden states for the draft" not in without.buffers


def test_a_profile_that_does_not_fit_is_refused_with_status_3(capsys):
    profile = replace(PROFILE, max_num_seqs=64)
    with pytest.raises(PlanError, match="KV blocks are needed and .* fit; lower") as caught:
        run_plan(profile, None, as_json=False)
    assert caught.value.exit_code == 3
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_flash_can_be_cut_into(ranks):
    make_plan(replace(PROFILE, tensor_parallel_size=ranks), CONFIG, [])


@pytest.mark.parametrize(
    ("field", "size", "message"),
    [
        ("num_attention_heads", 63, "num_attention_heads = 63"),
        ("head_dim", 6, r"num_attention_heads \* head_dim = 384 in multiples of 128"),
        ("o_groups", 5, "o_groups = 5"),
        ("o_lora_rank", 24, r"o_groups \* o_lora_rank = 192 in multiples of 128"),
        ("moe_intermediate_size", 1152, "moe_intermediate_size = 1152 in multiples of 128"),
    ],
)
def test_what_two_ranks_cannot_share_is_refused_with_status_3(field, size, message):
    with pytest.raises(PlanError, match=f"tensor_parallel_size = 2 does not divide .*{message}"):
        make_plan(PROFILE, CONFIG | {field: size}, [])


def test_the_vocabulary_is_padded_before_it_is_cut():
    make_plan(PROFILE, CONFIG | {"vocab_size": 129_279}, [])
    with pytest.raises(PlanError, match="vocab_size, padded = 129280$"):
        make_plan(
            replace(PROFILE, tensor_parallel_size=512),
            CONFIG
            | dict.fromkeys(("num_attention_heads", "o_groups"), 512)
            | {"moe_intermediate_size": 512 * 128},
            [],
        )


def test_a_number_of_ranks_that_does_not_divide_names_every_size():
    with pytest.raises(PlanError, match=r"= 3 does not divide num_attention_heads = 64; .*; "):
        plan_profile(replace(PROFILE, tensor_parallel_size=3), None)


def test_a_cpu_profile_has_no_plan():
    with pytest.raises(ConfigError, match="device = 'cpu'; a plan is for cuda"):
        plan_profile(load_profile("cpu-tiny"), None)


def test_what_was_not_measured_is_called_a_prediction(capsys):
    assert cli.main(["plan", "--profile", "128k"]) == 0
    printed = capsys.readouterr().out
    for label in predicted_bytes(CONFIG, PROFILE):
        assert f"prediction: {label}" in printed
    assert "7.15 GiB" in printed  # of eight requests


def test_json_holds_the_same(capsys):
    assert cli.main(["plan", "--profile", "128k", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["fits"] is True
    assert body["kv_blocks"] >= body["needed_blocks"]


def write_header(path, tensors, num_bytes=0):
    """A shard of which only the header is there."""
    header = {
        tensor.name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [0, num_bytes]}
        for tensor in tensors
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def test_shapes_come_from_headers_or_the_index_or_not_at_all(tmp_path):
    tensors = list(checkpoint_tensors(CONFIG, fp8_compressor=True))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="model.safetensors.index.json is missing"):
        read_checkpoint(tmp_path)
    index = {"weight_map": {tensor.name: "x" for tensor in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    _, from_index, source = read_checkpoint(tmp_path)
    assert (from_index, source) == (tensors, "the index and the config")
    write_header(tmp_path / "model.safetensors", tensors)
    _, from_header, source = read_checkpoint(tmp_path)
    assert (from_header, source) == (tensors, "the shards' headers")


def test_an_index_that_the_config_does_not_explain_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    index = {"weight_map": {"layers.43.x": "y"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="the config gives no layers.43.x"):
        read_checkpoint(tmp_path)


def test_a_shard_without_a_header_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x01")
    with pytest.raises(CheckpointError, match="its header is not safetensors JSON"):
        read_checkpoint(tmp_path)


def test_planning_imports_neither_torch_nor_vllm():
    code = "import sys, serve.plan; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
