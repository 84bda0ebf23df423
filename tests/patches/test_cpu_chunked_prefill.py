"""Guard of cpu-keep-chunked-prefill-for-deepseek-v4-without-amx.patch."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine
CHECKPOINT = Path(__file__).parents[2] / "tiny" / "checkpoint"


def test_without_amx_the_batch_limit_and_prefix_caching_stay_as_asked(monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    arguments = EngineArgs(
        model=str(CHECKPOINT),
        tokenizer_mode="deepseek_v4",
        max_model_len=4096,
        max_num_batched_tokens=512,
        enable_prefix_caching=True,
        enforce_eager=True,
    )
    config = arguments.create_engine_config()
    assert config.scheduler_config.max_num_batched_tokens == 512
    assert config.scheduler_config.enable_chunked_prefill
    assert config.cache_config.enable_prefix_caching
