"""Speculation is lossless on one GPU: what is sampled has one distribution with and without it.

The settings and the comparison are those of tests/engine/test_sampling_distribution.py. Its faults
are in the model runner of a CPU; here another temperature shows that a difference is seen.

A GPU has other kernels for one position than for the 1 + k that verify drafts, and its logits are
BF16: of 8 to 16, which the likely ones of these prompts are, they are 1/16 apart. Two lives may so
differ by a step or two in each logit, always the same, which 4,000 samples see. That much is
allowed, and the other temperature is far beyond it.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from scripts.gpu_case import KV_CACHE_BYTES
from scripts.gpu_check import INDEX_HEADS
from serve.allreduce_tier import FUSION_OFF, OTHERS_OFF
from tests.engine.engine import CHECKPOINT, run_script
from tests.engine.sampling_distribution import Settings, compare, score_beyond, settings
from tiny.config import TinyConfig
from tiny.export import repeat_index_heads

pytestmark = pytest.mark.gpu

SETTINGS = settings(CHECKPOINT)
# What an engine that knows no temperature and no top_p would sample.
OTHER: Settings = {"temperature and top_p": (SETTINGS["temperature and top_p"][0], {})}
DEPTHS = (1, 3)
COUNT = 4000
ALPHA = 1e-3 / (len(SETTINGS) * len(DEPTHS))  # of one false alarm in this file: 1e-3
ACCEPTED_SCORE = NormalDist().inv_cdf(1 - ALPHA)
CLEARLY = 6.0  # normal score: a p of 1e-9
RELATIVE = 2 / 16  # of a probability: two steps of a logit


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict[int, dict[str, np.ndarray]]:
    """By the number of drafts."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder = tmp_path_factory.mktemp("sampling")
    heads = TinyConfig.load(CHECKPOINT).index_n_heads
    repeat_index_heads(CHECKPOINT, folder / "tiny", INDEX_HEADS // heads)
    lives = (0, *DEPTHS)
    with ThreadPoolExecutor(len(lives)) as pool:  # an engine each, in a process of its own
        return dict(zip(lives, pool.map(lambda k: live(folder, k), lives), strict=True))


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
    assert score_beyond(found, (COUNT, COUNT), RELATIVE) < ACCEPTED_SCORE, found
    assert samples[k]["accepted"] > 0


@pytest.mark.parametrize("k", DEPTHS)
def test_another_distribution_is_seen(samples, k):
    (setting,) = OTHER
    found = compare(samples[0][f"sound/{setting}"], samples[k][f"other/{setting}"])
    assert score_beyond(found, (COUNT, COUNT), RELATIVE) > CLEARLY, found
