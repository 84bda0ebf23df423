"""Wrong answers that the check must refuse, before anything is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from bench.kernels.arms import Arm
from bench.kernels.check import Checker, Verdict, require, require_refusal, run_once
from bench.kernels.problem import Batch


def check_the_check(
    batch: Batch, ours: Arm, marlin: Arm, broken: Sequence[Arm], limit: float
) -> list[Verdict]:
    """Judge right and wrong answers on the last step of a batch.

    Args:
        ours: an arm that reads w13 interleaved.
        marlin: one that reads it in halves.
        broken: arms with something left out.
    Returns:
        The verdicts of the controls, all of them refusals.
    Raises:
        WrongAnswer: a right answer is refused, or a wrong one accepted.
    """
    last = batch.num_steps - 1
    checker = Checker(batch, last, limit)

    def output(arm: Arm, given: Batch = batch) -> Verdict:
        run_once(_all_steps(arm, given), given)
        return checker.judge(arm.name, arm.interleaved, given.outs[last], arm.factor)

    require(output(ours))
    require(output(marlin))
    other_reading = checker.judge("gate and up rows taken in halves", True, batch.outs[last])
    # One slot of one token is not computed: the smallest thing that can go missing.
    ids = batch.ids.clone()
    ids[last, 0, -1] = -1
    dropped = output(ours, dataclasses.replace(batch, ids=ids))
    dropped = dataclasses.replace(dropped, arm="one slot of one token left out")
    refusals = [other_reading, dropped, *(output(arm) for arm in broken)]
    return [require_refusal(verdict) for verdict in refusals]


def _all_steps(arm: Arm, batch: Batch) -> Callable[[], None]:
    step = arm.prepare(batch)

    def run() -> None:
        for i in range(batch.num_steps):
            step(i)

    return run
