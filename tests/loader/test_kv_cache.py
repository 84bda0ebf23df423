"""`serve plan`'s arithmetic of the KV cache against vLLM's own grouping."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

from scripts.make_full_size import FullSizeConfig, model_config
from serve.kv_cache import BATCHES_IN_FLIGHT, kv_layout, least_padding
from serve.plan import CARD_MIB
from tests.loader.conftest import ROOT, TIMEOUT_S
from tests.loader.kv_cache import CASES


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    result = tmp_path_factory.mktemp("kv") / "result.json"
    command = [sys.executable, "-m", "tests.loader.kv_cache", str(result)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return dict(zip(CASES, json.loads(result.read_text()), strict=True))


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_blocks_are_those_of_vllm(measured, case):
    layers, draft, window, batched_tokens = case
    in_flight = BATCHES_IN_FLIGHT * batched_tokens
    layout = kv_layout(model_config(FullSizeConfig(layers)), mtp=draft)
    assert measured[case] == {
        "block_bytes": layout.block_bytes,
        "request_blocks": layout.request_blocks(window, in_flight),
        "in_flight_tokens": in_flight,
    }


def test_one_more_token_of_context_costs_3915_bytes():
    layout = kv_layout(model_config(FullSizeConfig(43)), mtp=True)
    assert layout.block_bytes == 21 * (37_440 + 8_640) + 20 * 1_728 == 1_002_240
    assert layout.token_bytes == pytest.approx(3915, abs=0.1)
    assert layout.block_bytes < CARD_MIB * 2**20


@pytest.mark.parametrize(
    ("counts", "at_least", "size"), [([44, 21, 20], 21, 22), ([3], 1, 3), ([2, 5], 5, 5)]
)
def test_least_padding(counts, at_least, size):
    assert least_padding(counts, at_least) == size
