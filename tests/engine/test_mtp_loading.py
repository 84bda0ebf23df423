"""The draft's loader: every parameter or an error with the names."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from tests.engine.engine import CHECKPOINT, request
from tiny.export import INDEX, read_index

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def without(folder, drop: str, rename: str | None = None) -> None:
    """Copy the checkpoint with one tensor removed or renamed, index included."""
    shutil.copytree(CHECKPOINT, folder)
    index = json.loads((folder / INDEX).read_text())
    shard = folder / index["weight_map"].pop(drop)
    tensors = load_file(shard)
    tensor = tensors.pop(drop)
    if rename is not None:
        tensors[rename] = tensor
        index["weight_map"][rename] = shard.name
    save_file(tensors, shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("drop", "rename", "message"),
    [
        ("mtp.0.ffn.experts.7.w2.weight", None, "1 missing: mtp.0.ffn.experts.7.w2.weight"),
        ("mtp.0.ffn.gate.bias", None, "1 missing: mtp.0.ffn.gate.bias"),
        ("mtp.0.attn.wkv.scale", None, "1 missing: mtp.0.attn.wkv.weight_scale"),
        (
            "mtp.0.ffn.experts.3.w1.weight",
            "mtp.0.ffn.experts.3.gate_proj.weight",
            "1 missing: mtp.0.ffn.experts.3.w1.weight; 1 unexpected: .*gate_proj",
        ),
    ],
)
def test_a_broken_head_is_refused_by_name(run_engine, tmp_path, drop, rename, message):
    broken = tmp_path / "checkpoint"
    without(broken, drop, rename)
    assert drop not in read_index(broken)
    with pytest.raises(AssertionError, match=f"ValueError: load of the MTP head: {message}"):
        run_engine(
            broken,
            [request([30, 31], 1)],
            speculative_config={"method": "mtp", "num_speculative_tokens": 1},
        )
