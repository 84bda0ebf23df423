import json
import struct
from pathlib import Path

import pytest

INDEX = "model.safetensors.index.json"


def write_shard(path: Path, names: list[str]) -> None:
    """Write a safetensors file with one four-byte tensor per name."""
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
        for i, name in enumerate(names)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * len(names)))


@pytest.fixture
def checkpoint(tmp_path):
    """A sound checkpoint: two shards, an index, an MTP tensor."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v4"}))
    shards = {
        "model-00001-of-00002.safetensors": ["embed.weight", "layers.0.attn.wq_a.weight"],
        "model-00002-of-00002.safetensors": ["mtp.0.e_proj.weight"],
    }
    for name, tensors in shards.items():
        write_shard(folder / name, tensors)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder
