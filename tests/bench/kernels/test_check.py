"""What the check refuses."""

import pytest
import torch

from bench.kernels import measure
from bench.kernels.check import (
    FACTOR_OF_OTHERS,
    MAX_TOKENS,
    Checker,
    expected,
    run_once,
    step_to_compare,
)
from bench.kernels.measure import Bench, order_for
from tests.bench.kernels.fakes import LIMIT, SHAPE, FakeArm, FakeGpu, random_batch


def right_outputs(batch) -> torch.Tensor:
    return expected(batch, batch.num_steps - 1, True, LIMIT).exact.bfloat16()


def test_pytorchs_own_bf16_is_accepted_and_three_times_its_error_is_not():
    batch = random_batch()
    checker = Checker(batch, 1, LIMIT)
    wanted = expected(batch, 1, True, LIMIT)
    assert checker.judge("plain", True, wanted.plain).accepted
    error = wanted.plain.double() - wanted.exact
    worse = wanted.exact + 3 * error
    assert not checker.judge("worse", True, worse).accepted
    assert checker.judge("another's", True, worse, FACTOR_OF_OTHERS + 0.01).accepted


def test_a_token_that_is_not_compared_must_still_be_written():
    batch = random_batch(tokens=3 * MAX_TOKENS)
    compared = expected(batch, 1, True, LIMIT)
    assert len(compared.rows) == MAX_TOKENS
    assert {0, 3 * MAX_TOKENS - 1} <= set(compared.rows.tolist())
    out = torch.zeros(batch.hidden.shape, dtype=torch.bfloat16)
    out[compared.rows] = compared.plain
    checker = Checker(batch, 1, LIMIT)
    assert checker.judge("all", True, out).accepted
    out[1, 3] = float("nan")
    assert 1 not in compared.rows.tolist()
    assert not checker.judge("one missing", True, out).accepted


def test_a_step_with_something_unwritten_is_the_one_compared():
    batch = random_batch(steps=4)
    batch.outs.fill_(1.0)
    assert step_to_compare(batch) == 3
    batch.outs[1, 2, 5] = float("nan")
    assert step_to_compare(batch) == 1


def test_what_an_earlier_arm_wrote_does_not_pass_for_an_answer():
    batch = random_batch()
    batch.outs[1] = right_outputs(batch)
    run_once(lambda: None, batch)
    assert not Checker(batch, 1, LIMIT).judge("does nothing", True, batch.outs[1]).accepted


@pytest.fixture
def bench():
    gpu = FakeGpu()
    batch = random_batch()
    ours = FakeArm(gpu, "ours", 10.0)
    return Bench(gpu, SHAPE, [*batch.layers, batch.layers[0]], ours, [ours], LIMIT, True, 0)


def test_the_bytes_between_two_visits_are_the_least_of_all_windows(bench):
    measured = measure.Measured(case=None)
    measured.experts.append([4, 3, 2, 5, 2, 4])
    measure._keep_rotation(bench, measured)  # three layers: two others lie between
    assert measured.rotation_bytes == 5 * SHAPE.expert_bytes
    measured.experts.append([9, 9, 9])
    measure._keep_rotation(bench, measured)
    assert measured.rotation_bytes == 5 * SHAPE.expert_bytes


def test_arms_take_turns_in_one_order_and_then_in_the_other(bench):
    class Recorder:
        orders = []

        def time_round(self, graphs):
            self.orders.append(list(graphs))
            return [100.0 * graph for graph in graphs]

    recorder = Recorder()
    times = measure._rounds(recorder, [1, 2, 3], 4, separator=True, steps=10)
    assert recorder.orders == [[1, 2, 3], [3, 2, 1], [1, 2, 3], [3, 2, 1]]
    assert times == [[-20.0] * 4, [-10.0] * 4]  # the third is the separator, of 300


def test_small_batches_go_through_the_layers_more_than_once():
    assert order_for(1, 7) == tuple(range(7)) * 4
    assert order_for(128, 7) == tuple(range(7))
