"""Compile TileLang's kernels for vLLM in processes beside it, before it compiles them one by one.

At start vLLM 0.32.0 compiles each specialization of DeepSeek-V4's mHC kernels in one thread, 15 s
apiece on an H100 host: 35 of `MhcPreBigFuseTileLangKernel` alone. TileLang keeps on disk what it
compiled, so workers fill that cache and vLLM's own loop then finds it there. They start when the
model's layers announce their kernels, and work while weights are loaded. A worker that fails costs
time only: vLLM compiles the key itself. Each worker may hold a CUDA context while it runs. Engines
that start together share the work: a key is locked by whoever compiles it, and its next taker finds
it in the cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SLOW_S = 6.0  # a key that took longer was not in TileLang's cache


def compile_many(kernel: Any, keys: Iterable[Any], workers: int) -> None:
    """Every key, in order; once one was slow, the others by workers first."""
    left = list(keys)
    while left:
        start = time.perf_counter()
        kernel.compile(left.pop(0))
        if time.perf_counter() - start > SLOW_S and len(left) > 1:
            break
    compile_beside(kernel, left, workers)
    for key in left:
        kernel.compile(key)


def compile_beside(kernel: Any, keys: list[Any], workers: int) -> None:
    """Let workers compile the keys, and wait for them."""
    for worker in start(kernel, keys, workers):
        worker.wait()


def start(kernel: Any, keys: list[Any], workers: int) -> list[subprocess.Popen[bytes]]:
    """Workers that compile these keys."""
    name = (type(kernel).__module__, type(kernel).__qualname__)
    running = []
    for part in (keys[i::workers] for i in range(workers)):
        if part:
            worker = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE)
            assert worker.stdin is not None
            # One that has died already leaves its keys to vLLM.
            with contextlib.suppress(BrokenPipeError), worker.stdin as keys_file:
                keys_file.write(pickle.dumps((name, part)))
            running.append(worker)
    return running


class Ahead:
    """Workers that compile what was registered for the warm-up, before it begins.

    Args:
        workers: how many for one kernel.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.sent: dict[Any, set[Any]] = {}
        self.registered: set[tuple[Any, str]] = set()
        self.running: dict[Any, list[subprocess.Popen[bytes]]] = {}

    def register(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        """Start on the keys of one registration; every layer makes much the same."""
        if (kernel, repr(kwargs)) in self.registered:
            return
        self.registered.add((kernel, repr(kwargs)))
        sent = self.sent.setdefault(kernel, set())
        try:
            keys = [key for key in kernel.get_warmup_keys(*args, **kwargs) if key not in sent]
        except TypeError:
            return  # it takes the vllm_config that only the registry has: left to the warm-up
        sent.update(keys)
        self.running.setdefault(kernel, []).extend(start(kernel, keys, self.workers))

    def compile_many(self, kernel: Any, keys: Iterable[Any]) -> None:
        """What the warm-up calls: wait for the workers, then take every key from the cache."""
        for worker in self.running.pop(kernel, []):
            worker.wait()
        compile_many(kernel, keys, self.workers)


def install(workers: int) -> None:
    """Make vLLM's warm-up of TileLang kernels use workers."""
    from vllm.model_executor.warmup.jit_warmup_tilelang_helper import VllmTileLangJitKernel

    ahead = Ahead(workers)
    register_warmup = VllmTileLangJitKernel.register_warmup

    @functools.wraps(register_warmup)
    def register(kernel: Any, *args: Any, **kwargs: Any) -> None:
        register_warmup(kernel, *args, **kwargs)
        ahead.register(kernel, *args, **kwargs)

    VllmTileLangJitKernel.register_warmup = register
    VllmTileLangJitKernel.compile_many = lambda kernel, keys: ahead.compile_many(kernel, keys)


@contextlib.contextmanager
def locked(what: str) -> Iterator[None]:
    """Hold this name against every other process of this user."""
    folder = Path(tempfile.gettempdir()) / f"dsv4-jit-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    name = hashlib.sha256(what.encode()).hexdigest()
    with (folder / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """A worker: compile the keys that come on standard input, as `compile_beside` sends them."""
    (module, qualified_name), keys = pickle.loads(sys.stdin.buffer.read())  # noqa: S301 - our own
    kernel = importlib.import_module(module)
    for part in qualified_name.split("."):
        kernel = getattr(kernel, part)
    random.Random(os.getpid()).shuffle(keys)  # engines started together begin with different keys
    for key in keys:
        with locked(f"{module}.{qualified_name} {key!r}"):
            kernel().compile(key)


if __name__ == "__main__":
    main()
