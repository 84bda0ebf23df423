"""vLLM's CPU worker with our bounded all-reduce, over the emulation of its kernel.

`EMULATION` names the library that `tests/kernels/emulated_links.py` builds.
"""

import os
from pathlib import Path

import torch
from vllm.v1.worker import cpu_worker

from kernels import allreduce_abi as abi
from kernels.allreduce import OneShotAllReduce, Tier, check_call, exchange_by_group
from kernels.bounded_worker import BoundedWorker, Reduce, seconds


class Worker(BoundedWorker, cpu_worker.CPUWorker):
    """One rank."""

    def make_all_reduce(self, group, tier: Tier) -> tuple[OneShotAllReduce, Reduce]:
        deadline_s = seconds("DSV4_ALLREDUCE_START_DEADLINE_S")  # another one once it is warm
        exchange = exchange_by_group(group.cpu_group)
        library = abi.load(Path(os.environ["EMULATION"]))
        end = OneShotAllReduce(
            group.rank_in_group, group.world_size, exchange, tier, deadline_s=deadline_s,
            hash_every=1, library=library,
        )  # fmt: skip

        def reduce(x: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(x)
            num_bytes = check_call(x, out, end.max_bytes)
            end.launch(x.data_ptr(), out.data_ptr(), num_bytes, None)
            return out

        return end, reduce
