"""One rank of an emulated all-reduce, as a process: `allreduce_process.py JSON`.

Prints a line of JSON: the outputs' hashes, the error of `check`, how long the last call took.
"""

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from kernels import allreduce_abi as abi
from kernels.allreduce import OneShotAllReduce, exchange_by_store


def inputs(rank: int, call: int, num_bytes: int) -> torch.Tensor:
    """Random numbers; none is so near to 0 that a wrong one would be lost in the sum's rounding."""
    g = torch.Generator().manual_seed(1000 * call + rank)
    x = torch.randn(num_bytes // 2, generator=g)
    return (x + x.sign() / 4).to(torch.bfloat16)


def exact(world_size: int, call: int, num_bytes: int) -> torch.Tensor:
    """FP32 in the order of ranks, rounded once."""
    total = inputs(0, call, num_bytes).float()
    for rank in range(1, world_size):
        total = total + inputs(rank, call, num_bytes).float()
    return total.to(torch.bfloat16)


def main() -> None:
    options = json.loads(sys.argv[1])
    rank, world_size = options["rank"], options["world_size"]
    store = torch.distributed.FileStore(options["store"], world_size)
    communicator = OneShotAllReduce(
        rank,
        world_size,
        exchange_by_store(store, rank, world_size),
        tier=options["tier"],
        max_bytes=options.get("max_bytes", abi.MAX_BYTES),
        deadline_s=options["deadline_s"],
        hash_every=options.get("hash_every", 1),
        first_generation=options.get("first_generation", 1),
        library=abi.load(Path(options["library"])),
    )
    faults = {int(call): fault for call, fault in options.get("faults", {}).items()}
    deadlines = {int(call): s for call, s in options.get("deadlines", {}).items()}
    hashes, wrong, seconds = [], [], 0.0
    for call, num_bytes in enumerate(options["sizes"]):
        fault = faults.get(call)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "skip":
            continue
        elif fault:
            time.sleep(fault)
        if call in deadlines:
            communicator.set_eager_deadline(deadlines[call])
        x = inputs(rank, call, num_bytes)
        out = torch.full_like(x, float("nan"))
        start = time.monotonic()
        communicator.launch(x.data_ptr(), out.data_ptr(), num_bytes, None)
        seconds = time.monotonic() - start
        if communicator.expired():
            break
        hashes.append(hashlib.sha256(out.view(torch.uint8).numpy().tobytes()).hexdigest())
        if not torch.equal(out, exact(world_size, call, num_bytes)):
            wrong.append(call)
    error = None
    try:
        communicator.check()
    except RuntimeError as caught:
        error = str(caught)
    state = abi.State()
    ctypes.memmove(ctypes.byref(state), communicator._args.state, ctypes.sizeof(state))
    result = {"hashes": hashes, "wrong": wrong, "error": error, "seconds": seconds}
    mismatch = communicator.mismatch()
    result |= {"mismatch": mismatch and mismatch.generation}
    result |= {"generation": state.generation, "completed": communicator.completed}
    print(json.dumps(result), flush=True)
    communicator.close()


if __name__ == "__main__":
    main()
