"""What a worker says when something else fails behind a wait that gave up.

The real engine over a link that breaks is tests/engine/test_bounded_all_reduce.py; a CUDA error
needs a GPU, so here vLLM's worker is made up.
"""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from vllm.v1.outputs import AsyncModelRunnerOutput

from kernels.bounded_worker import DEADLINES_S, BoundedWorker
from serve.watchdog import WatchConfig

GAVE_UP = "all_reduce_oneshot: rank 0 waited 2.00 s for rank 1"


class End:
    """An all-reduce's end whose record says `fault`, if anything."""

    def __init__(self) -> None:
        self.fault = None
        self.eager_deadline_s = None

    def check(self) -> None:
        if self.fault:
            raise RuntimeError(self.fault)

    def set_eager_deadline(self, seconds: float) -> None:
        self.eager_deadline_s = seconds


class Later(AsyncModelRunnerOutput):
    """Tokens whose copy fails."""

    def get_output(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class VllmWorker:
    """Each call does what it was given."""

    def call(self, what):
        return what()

    execute_model = sample_tokens = call
    determine_available_memory = compile_or_warm_up_model = call


class Worker(BoundedWorker, VllmWorker):
    """The mixin over it."""


@pytest.fixture
def worker():
    made = Worker()
    made._end = End()
    return made


def fails():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


CALLS = (
    "execute_model", "sample_tokens", "determine_available_memory", "compile_or_warm_up_model",
)  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_wait_that_gave_up_is_named_before_what_failed_behind_it(worker, name):
    with pytest.raises(RuntimeError, match="CUDA error"):
        getattr(worker, name)(fails)
    worker._end.fault = GAVE_UP
    for what in (fails, lambda: "tokens"):
        with pytest.raises(RuntimeError, match=GAVE_UP):
            getattr(worker, name)(what)


@pytest.mark.parametrize("name", ["execute_model", "sample_tokens"])
def test_so_it_is_when_the_tokens_are_still_on_their_way(worker, name):
    output = getattr(worker, name)(Later)
    with pytest.raises(RuntimeError, match="CUDA error"):
        output.get_output()
    worker._end.fault = GAVE_UP
    with pytest.raises(RuntimeError, match=GAVE_UP):
        output.get_output()


def test_a_worker_without_our_all_reduce_is_vllms():
    assert Worker().execute_model(lambda: "tokens") == "tokens"
    assert isinstance(Worker().sample_tokens(Later), Later)


def test_a_warm_worker_no_longer_has_minutes(worker):
    worker.compile_or_warm_up_model(lambda: None)
    assert worker._end.eager_deadline_s == DEADLINES_S["DSV4_ALLREDUCE_EAGER_DEADLINE_S"]


def test_the_kernels_speak_before_the_watchdog_guesses(tmp_path):
    config = WatchConfig(tmp_path, "model")
    waits = DEADLINES_S["DSV4_ALLREDUCE_START_DEADLINE_S"]
    assert waits < min(config.start_step_timeout_s, config.start_stall_timeout_s)
    assert DEADLINES_S["DSV4_ALLREDUCE_EAGER_DEADLINE_S"] < config.stall_timeout_s
