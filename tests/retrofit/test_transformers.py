"""The problem that `retrofit` exists for: Transformers loses the MTP head without a word."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kernels.weights import Layout
from retrofit.inspection import head_of
from retrofit.layout import head_tensors
from retrofit.reading import scan

transformers = pytest.importorskip("transformers")
MODEL = "DeepseekV4ForCausalLM"


@pytest.fixture
def with_head(tmp_path, original):
    """A small model as Transformers writes it, and the tiny model's BF16 head beside it."""
    if not hasattr(transformers, MODEL):
        pytest.skip(f"transformers {transformers.__version__} has no {MODEL}")
    config = json.loads((original / "config.json").read_text())
    config.pop("quantization_config")
    folder = tmp_path / "with_head"
    # Transformers has its own names and sizes; what counts here is what it does with `mtp.*`.
    settings = transformers.DeepseekV4Config(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=8,
        q_lora_rank=32,
        o_lora_rank=16,
        o_groups=2,
        index_n_heads=2,
        index_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        num_hash_layers=0,
        layer_types=["sliding_attention"] * 2,
    )
    torch.manual_seed(0)
    transformers.DeepseekV4ForCausalLM(settings).save_pretrained(folder)
    shard = folder / "model.safetensors"
    with safe_open(shard, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for spec in head_tensors(config, Layout.BF16).values():
        tensors[spec.name] = torch.zeros(spec.shape, dtype=torch.bfloat16)
    save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def names_of(folder) -> set[str]:
    return set(scan(folder).entries)


def test_loading_and_saving_drops_the_head_without_an_error(with_head, tmp_path, caplog):
    before = {name for name in names_of(with_head) if name.startswith("mtp.")}
    assert len(before) == 77
    saved = tmp_path / "saved"
    with warnings.catch_warnings(record=True) as caught:
        model, info = transformers.DeepseekV4ForCausalLM.from_pretrained(
            with_head, output_loading_info=True
        )
        model.save_pretrained(saved)
    after = names_of(saved)
    assert after == names_of(with_head) - before
    assert not any("mtp" in str(name) for name in info["unexpected_keys"])
    assert not any("mtp" in str(warning.message) for warning in caught)
    assert "mtp" not in caplog.text
    assert head_of(scan(saved)).state == "absent"
