"""Speculation is lossless on one GPU: what is sampled has one distribution with and without it.

The settings and the comparison are those of tests/engine/test_sampling_distribution.py. Its faults
are in the model runner of a CPU; here another temperature shows that a difference is seen.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.gpu_case import KV_CACHE_BYTES
from scripts.gpu_check import INDEX_HEADS
from serve.allreduce_tier import FUSION_OFF, OTHERS_OFF
from tests.engine.engine import CHECKPOINT, run_script
from tests.engine.sampling_distribution import Settings, compare, settings
from tiny.config import TinyConfig
from tiny.export import repeat_index_heads

pytestmark = pytest.mark.gpu

SETTINGS = settings(CHECKPOINT)
# What an engine that knows no temperature and no top_p would sample.
OTHER: Settings = {"temperature and top_p": (SETTINGS["temperature and top_p"][0], {})}
DEPTHS = (1, 3)
COUNT = 4000
ALPHA = 1e-3 / (len(SETTINGS) * len(DEPTHS))  # of one false alarm in this file: 1e-3
CLEARLY = 6.0  # normal score: a p of 1e-9


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict[int, dict[str, np.ndarray]]:
    """By the number of drafts."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder = tmp_path_factory.mktemp("sampling")
    heads = TinyConfig.load(CHECKPOINT).index_n_heads
    repeat_index_heads(CHECKPOINT, folder / "tiny", INDEX_HEADS // heads)
    return {k: live(folder, k) for k in (0, *DEPTHS)}


def live(folder: Path, k: int) -> dict[str, np.ndarray]:
    engine = {
        "max_model_len": 1024,
        "max_num_batched_tokens": 2048,
        "dtype": "bfloat16",
        "block_size": 256,
        "kv_cache_dtype": "fp8",
        "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "disable_custom_all_reduce": True,
        "compilation_config": FUSION_OFF,
        "seed": k,
    }
    if k:
        engine["speculative_config"] = {"method": "mtp", "num_speculative_tokens": k}
    parts = [
        {"name": "sound", "settings": SETTINGS, "count": COUNT},
        {"name": "other", "settings": OTHER, "count": COUNT},
    ]
    job, result = folder / f"{k}.json", folder / f"{k}.npz"
    job.write_text(json.dumps({"model": str(folder / "tiny"), "engine": engine, "samples": parts}))
    # FlashInfer's sampler takes minutes to build.
    run_script(
        "sampling_distribution.py", job, result, OTHERS_OFF | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    )
    with np.load(result) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("k", DEPTHS)
def test_drafts_do_not_change_the_distribution(samples, k, setting):
    name = f"sound/{setting}"
    found = compare(samples[0][name], samples[k][name])
    assert found.p > ALPHA, found
    assert samples[k]["accepted"] > 0


@pytest.mark.parametrize("k", DEPTHS)
def test_another_distribution_is_seen(samples, k):
    (setting,) = OTHER
    found = compare(samples[0][f"sound/{setting}"], samples[k][f"other/{setting}"])
    assert found.score > CLEARLY, found
