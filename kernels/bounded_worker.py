"""What makes a vLLM worker reduce over our bounded all-reduce, and fail the step when it gives up.

Mixed into a worker before vLLM's class: `kernels.nvidia.worker.Worker`, which `--worker-cls` names.
No patch: the worker replaces `all_reduce` of its tensor-parallel group's communicator, and looks at
the record of every step's waits before the step's tokens leave the process. So no token of a step
in which a wait gave up is sent. Sums that differ are seen at the next call that is hashed: tokens
of the steps since the last one may have been sent.

The environment says what to do; `serve` sets it from what the probe of the link found.

    DSV4_ALLREDUCE_TIER              host-pinned or peer-push; another of serve's tiers, or none,
                                     leaves vLLM's own
    DSV4_ALLREDUCE_DEADLINE_S        of waits in CUDA graphs, 2
    DSV4_ALLREDUCE_EAGER_DEADLINE_S  of others, 30: a rank may compile a kernel for a new shape
    DSV4_ALLREDUCE_START_DEADLINE_S  of others until the worker is warm, 240: it compiles, and ranks
                                     do so at once; serve's watchdog waits longer
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kernels import allreduce_abi as abi
from kernels.allreduce import OP, OneShotAllReduce, Tier, check_deadline, exchange_by_group

OTHER_TIERS = ("vllm-custom", "nccl-p2p", "nccl-shm")
Reduce = Callable[[torch.Tensor], torch.Tensor]
DEADLINES_S = {
    "DSV4_ALLREDUCE_DEADLINE_S": 2.0,
    "DSV4_ALLREDUCE_EAGER_DEADLINE_S": 30.0,
    "DSV4_ALLREDUCE_START_DEADLINE_S": 240.0,
}


def chosen_tier() -> Tier | None:
    """The tier of ours that the environment names; None for one of vLLM's or NCCL's.

    Raises:
        ValueError: it is none that there is.
    """
    name = os.environ.get("DSV4_ALLREDUCE_TIER", "")
    if name in [tier.value for tier in Tier]:
        return Tier(name)
    if name and name not in OTHER_TIERS:
        known = ", ".join([*(tier.value for tier in Tier), *OTHER_TIERS])
        raise ValueError(f"{OP}: DSV4_ALLREDUCE_TIER = {name!r}; must be one of {known}")
    return None


def seconds(name: str) -> float:
    """A deadline from the environment.

    Raises:
        ValueError: it is no number, or out of range.
    """
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else DEADLINES_S[name]
    except ValueError:
        raise ValueError(f"{OP}: {name} = {text!r}; a number of seconds is needed") from None
    check_deadline(value, name)
    return value


def takes(x: torch.Tensor, max_bytes: int) -> bool:
    """Whether our kernel takes a tensor. Ranks must agree, so only on what they have in common."""
    num_bytes = x.numel() * x.element_size()
    return x.dtype is torch.bfloat16 and 0 < num_bytes <= max_bytes and num_bytes % 16 == 0


@functools.cache
def checked_output() -> type:
    """The class of outputs that are still on their way: checked when they are here."""
    from vllm.v1.outputs import AsyncModelRunnerOutput

    class Checked(AsyncModelRunnerOutput):
        """`output`'s tokens, under a `fault_first` of the worker."""

        def __init__(self, output: AsyncModelRunnerOutput, fault_first: Callable[[], Any]) -> None:
            self._output, self._fault_first = output, fault_first

        def get_output(self) -> Any:
            with self._fault_first():
                return self._output.get_output()  # waits for the step's last kernel

    return Checked


class BoundedWorker:
    """Mixin of a vLLM worker. Does nothing with one rank, or with a tier that is not ours."""

    _end: OneShotAllReduce | None = None

    def make_all_reduce(self, group: Any, tier: Tier) -> tuple[OneShotAllReduce, Reduce]:
        """This rank's end, and how a tensor that `takes` accepts goes through it."""
        end = OneShotAllReduce(
            group.rank_in_group,
            group.world_size,
            exchange_by_group(group.cpu_group),
            tier,
            device=self.device,
            deadline_s=seconds("DSV4_ALLREDUCE_DEADLINE_S"),
            eager_deadline_s=seconds("DSV4_ALLREDUCE_START_DEADLINE_S"),
        )
        return end, end.all_reduce

    def init_device(self) -> None:
        """As vLLM's; then the tensor-parallel group reduces through our kernel what it takes."""
        super().init_device()
        from vllm.distributed.parallel_state import get_tp_group

        tier, group = chosen_tier(), get_tp_group()
        if tier is None or group.world_size == 1:
            return
        for name in DEADLINES_S:  # before minutes of loading, not after them
            seconds(name)
        communicator = group.device_communicator
        self._end, ours = self.make_all_reduce(group, tier)
        others = communicator.all_reduce

        def all_reduce(x: torch.Tensor) -> torch.Tensor:
            if not takes(x, abi.MAX_BYTES):
                return others(x)
            x = x.contiguous()
            return ours(x if x.data_ptr() % abi.SIZE_MULTIPLE == 0 else x.clone())

        communicator.all_reduce = all_reduce
        communicator.one_shot_comm = self._end  # for the load record

    @contextmanager
    def fault_first(self) -> Iterator[None]:
        """Fail if a wait of the all-reduces within passed the deadline, whatever else failed then.

        After a wait that gave up kernels work on garbage, or on the memory of a peer that is gone:
        the CUDA error that follows must not hide what came before it.
        """
        try:
            yield
        finally:
            if self._end is not None:
                self._end.check()

    def determine_available_memory(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, which runs the model for the first time."""
        with self.fault_first():
            return super().determine_available_memory(*args, **kwargs)

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; after it, a rank no longer has minutes to compile."""
        with self.fault_first():
            result = super().compile_or_warm_up_model(*args, **kwargs)
        if self._end is not None:
            self._end.set_eager_deadline(seconds("DSV4_ALLREDUCE_EAGER_DEADLINE_S"))
        return result

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; the step fails if a wait of its all-reduces passed the deadline."""
        return self._checked(lambda: super(BoundedWorker, self).execute_model(*args, **kwargs))

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; the step fails if a wait of its all-reduces passed the deadline."""
        return self._checked(lambda: super(BoundedWorker, self).sample_tokens(*args, **kwargs))

    def _checked(self, step: Callable[[], Any]) -> Any:
        if self._end is None:
            return step()
        from vllm.v1.outputs import AsyncModelRunnerOutput

        with self.fault_first():
            output = step()
        if isinstance(output, AsyncModelRunnerOutput):
            return checked_output()(output, self.fault_first)
        return output
