import json

import pytest

from serve.checkpoint import check_checkpoint
from serve.errors import CheckpointError
from tests.serve.conftest import INDEX, write_shard

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def test_a_sound_checkpoint_passes_with_and_without_speculation(checkpoint):
    check_checkpoint(checkpoint, 0)
    check_checkpoint(checkpoint, 1)


def test_one_shard_needs_no_index(checkpoint):
    (checkpoint / INDEX).unlink()
    (checkpoint / FIRST).unlink()
    check_checkpoint(checkpoint, 1)


def missing_folder(folder):
    folder.rename(folder.with_name("elsewhere"))


def missing_config(folder):
    (folder / "config.json").unlink()


def unreadable_config(folder):
    (folder / "config.json").write_text("{")


def list_config(folder):
    (folder / "config.json").write_text("[]")


def other_model(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')


def no_shard(folder):
    for path in folder.glob("*.safetensors"):
        path.unlink()


def absent_shard(folder):
    (folder / FIRST).unlink()


def unlisted_shard(folder):
    write_shard(folder / "mtp.safetensors", ["mtp.0.h_proj.weight"])


def two_shards_no_index(folder):
    (folder / INDEX).unlink()


def unreadable_index(folder):
    (folder / INDEX).write_text("not json")


def empty_index(folder):
    (folder / INDEX).write_text("{}")


def misplaced_tensor(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["mtp.0.e_proj.weight"] = FIRST
    index["weight_map"]["mtp.0.h_proj.weight"] = SECOND
    (folder / INDEX).write_text(json.dumps(index))


def truncated_data(folder):
    data = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(data[:-1])


def truncated_header(folder):
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:20])


def truncated_length(folder):
    (folder / FIRST).write_bytes(b"\x01")


def extra_bytes(folder):
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes() + b"x")


def bad_header(folder):
    (folder / FIRST).write_bytes((2).to_bytes(8, "little") + b"[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_folder, "no such folder"),
        (missing_config, "config.json is missing"),
        (unreadable_config, "config.json: not JSON"),
        (list_config, "not a JSON object"),
        (other_model, "model_type = 'llama'; must be one of deepseek_v4"),
        (no_shard, r"no \*.safetensors file"),
        (absent_shard, f"lists {FIRST}, which does not exist"),
        (unlisted_shard, "does not list mtp.safetensors; vLLM would drop the file silently"),
        (two_shards_no_index, "2 shards and no model.safetensors.index.json"),
        (unreadable_index, "not JSON"),
        (empty_index, "no weight_map"),
        (misplaced_tensor, f"mtp.0.e_proj.weight is not in {FIRST}"),
        (
            truncated_data,
            "truncated: the header describes 8 bytes of tensor data, the file holds 7",
        ),
        (truncated_header, "truncated: a header of"),
        (truncated_length, "truncated: 1 bytes"),
        (extra_bytes, "too long: the header describes 8 bytes"),
        (bad_header, "not safetensors JSON"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_checkpoint(checkpoint, 0)
    assert "\n" not in str(caught.value)


def test_speculation_without_an_mtp_tensor_is_refused(checkpoint):
    (checkpoint / INDEX).unlink()
    (checkpoint / SECOND).unlink()
    check_checkpoint(checkpoint, 0)
    with pytest.raises(CheckpointError, match=r"num_speculative_tokens = 1, .* mtp\.0\.\*"):
        check_checkpoint(checkpoint, 1)
