"""Two ranks of the real engine over our all-reduce protocol: it reduces, and it cannot hang."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("vllm")

from kernels.build import ROOT
from tests.engine.engine import CHECKPOINT, request
from tests.engine.test_tensor_parallel import ENV, TWO_RANKS
from tests.kernels.emulated_links import build_emulation

pytestmark = [pytest.mark.engine, pytest.mark.slow]

DEADLINE_S = 60.0  # a rank of a sound link is never so late, however busy the machine is
SHORT_S = 10.0  # where it is to pass, once the ranks are warm
REQUESTS = [request(list(range(5, 13)), 24)]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    library = build_emulation(tmp_path_factory.mktemp("emulation"))
    return ENV | {
        "PYTHONPATH": str(ROOT),  # of the workers, which import a class of the tests
        "EMULATION": str(library),
        "DSV4_ALLREDUCE_TIER": "peer-push",
        "DSV4_ALLREDUCE_EAGER_DEADLINE_S": str(DEADLINE_S),
        "DSV4_ALLREDUCE_START_DEADLINE_S": str(DEADLINE_S),
    }


OURS = TWO_RANKS | {"worker_cls": "tests.engine.bounded_cpu_worker.Worker", "dtype": "bfloat16"}


def test_two_ranks_reduce_over_our_protocol(run_engine, tmp_path, env):
    record = tmp_path / "load.json"
    ours = run_engine(CHECKPOINT, REQUESTS, env=env | {"DSV4_LOAD_RECORD": str(record)}, **OURS)
    others = run_engine(CHECKPOINT, REQUESTS, env=ENV, **TWO_RANKS, dtype="bfloat16")
    assert ours.tokens(0) == others.tokens(0)
    parts = json.loads(record.read_text())
    for part in ("target", "draft"):
        assert parts[part]["all_reduce"] == ["CpuCommunicator", "OneShotAllReduce (peer-push)"]


@pytest.mark.parametrize(
    ("fault", "deadline_s", "said"),
    [
        ("lose:9000", SHORT_S, r"rank \d waited \d+\.\d\d s for rank \d: generation \d\d+, "),
        ("corrupt:9000", DEADLINE_S, "ranks 0 and 1 hold different sums of generation"),
    ],
)
def test_a_broken_link_fails_the_step_and_ends_the_engine(run_engine, env, fault, deadline_s, said):
    env = env | {"EMULATED_FAULT": fault, "DSV4_ALLREDUCE_EAGER_DEADLINE_S": str(deadline_s)}
    with pytest.raises(AssertionError) as caught:  # of the exit status; a hang would be a timeout
        run_engine(CHECKPOINT, REQUESTS, env=env, **OURS)
    log = str(caught.value)
    assert re.search(rf"all_reduce_oneshot: {said}", log), log
