"""Two workers of the patched engine, as the product runs them, on a CPU."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("vllm")

from bench.near_ties import first_difference
from tests.engine.engine import CHECKPOINT, request
from tests.engine.test_mtp_loading import without

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
OPTIONS = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
TWO_RANKS = OPTIONS | {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


# One step of a BF16 logit of 16 to 32: two ranks round their halves of a sum.
BF16_STEP = 0.125


def test_two_ranks_say_what_one_says_up_to_a_tie(run_engine, tmp_path):
    requests = [request(list(range(5, 13)), 24, "output")]
    record = tmp_path / "load.json"
    two = run_engine(CHECKPOINT, requests, env=ENV | {"DSV4_LOAD_RECORD": str(record)}, **TWO_RANKS)
    one = run_engine(CHECKPOINT, requests, env=ENV, **OPTIONS)
    assert len(one.tokens(0)) == len(two.tokens(0))
    first = first_difference(one.tokens(0), two.tokens(0))
    if first is not None:
        best = one.logprobs(0)[first].topk(2).values
        assert best[0] - best[1] <= BF16_STEP, f"token {first}"
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
