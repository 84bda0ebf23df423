"""Two workers of the patched engine, as the product runs them, on a CPU."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("vllm")

from tests.engine.engine import CHECKPOINT, ROOT, request
from tests.engine.test_mtp_loading import without
from tests.engine.yardstick import yardstick
from tiny import tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
OPTIONS = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
TWO_RANKS = OPTIONS | {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.fixture(scope="module")
def requests():
    ids = tokenizer.load(CHECKPOINT).encode((ROOT / "tiny" / "heldout.txt").read_text()).ids
    return [request(ids[650 * i :][:129], 16, "all") for i in range(4)]


def test_two_ranks_agree_with_the_plain_model(run_engine, requests, tmp_path):
    record = tmp_path / "load.json"
    run = run_engine(
        CHECKPOINT,
        requests,
        batches=[[i] for i in range(len(requests))],
        env=ENV | {"DSV4_LOAD_RECORD": str(record)},
        **TWO_RANKS,
    )
    yardstick(CHECKPOINT).assert_close(requests, run)
    entries = json.loads(record.read_text())
    for part in ("target", "draft"):
        assert entries[part]["tensor_parallel_size"] == 2
        assert entries[part]["all_reduce"] == ["CpuCommunicator"]


def test_a_broken_head_ends_an_engine_of_two_ranks(run_engine, tmp_path):
    broken = tmp_path / "checkpoint"
    without(broken, "mtp.0.ffn.experts.7.w2.weight")
    said = r"ValueError: load of the MTP head: 1 missing: mtp\.0\.ffn\.experts\.7\.w2\.weight"
    with pytest.raises(AssertionError) as caught:  # of the exit status; a hang would be a timeout
        run_engine(broken, [request([30, 31], 1)], env=ENV, **TWO_RANKS)
    log = str(caught.value)
    assert re.search(rf"Worker_TP\d .*{said}", log)
