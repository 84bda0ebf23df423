"""One-shot BF16 all-reduce of processes on one machine, over PCIe, with a deadline in the kernel.

    communicator = OneShotAllReduce(rank, world_size, exchange_by_store(store, rank, world_size))
    out = communicator.all_reduce(x)
    communicator.check()  # on the host: raises if a wait passed its deadline, or if sums differ

Two tiers, one kernel: HOST_PINNED passes lines through a registered region of /dev/shm and needs
no peer access; PEER_PUSH stores them into the peer's memory, mapped with CUDA IPC, and must be used
only on a link that `python -m kernels.probe` found healthy. The protocol is in
`csrc/allreduce_protocol.cuh`.

All ranks make the same calls in the same order, each on one stream at a time. Calls can be captured
in CUDA graphs: what changes from call to call lies in device memory. A call allocates nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch

from kernels import allreduce_abi as abi
from kernels.allreduce_abi import AllReduceArgs, Control, Library, SharedRegion, State

OP = "all_reduce_oneshot"
MAX_DEADLINE_S = 3600
HASH_EVERY = 1024  # calls: some ten decode steps

Exchange = Callable[[str, Any], list[Any]]  # (step, my JSON value) -> those of all ranks, in order


class Tier(StrEnum):
    """Where the lines go."""

    HOST_PINNED = "host-pinned"
    PEER_PUSH = "peer-push"


class Store(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str) -> None:
        """Set a value for all."""

    def get(self, key: str) -> bytes:
        """Wait for a value."""


@dataclass(frozen=True)
class Expired:
    """A wait that passed the deadline: who waited for what."""

    rank: int
    source: int
    operation: int
    generation: int
    expected: int
    seen: tuple[int, int]
    block: int
    line: int
    num_bytes: int
    waited_s: float

    def __str__(self) -> str:
        return (
            f"{OP}: rank {self.rank} waited {self.waited_s:.2f} s for rank {self.source}: "
            f"generation {self.generation}, {self.num_bytes} bytes, line {self.line} of "
            f"{self.num_bytes // 8}, block {self.block}: expected {self.expected}, seen "
            f"{self.seen[0]} and {self.seen[1]}; results since are invalid, this communicator is "
            "aborted"
        )


@dataclass(frozen=True)
class Mismatch:
    """Two ranks that hold different sums of one call: the link changed what was sent."""

    generation: int
    ranks: tuple[int, int]
    hashes: tuple[int, int]

    def __str__(self) -> str:
        (a, b), (x, y) = self.ranks, self.hashes
        return (
            f"{OP}: ranks {a} and {b} hold different sums of generation {self.generation}: their "
            f"hashes are {x:#010x} and {y:#010x}; the link gives wrong data, results are invalid"
        )


def exchange_by_store(store: Store, rank: int, world_size: int, prefix: str = OP) -> Exchange:
    """Exchange values through a torch.distributed store, once per step and prefix."""

    def exchange(step: str, value: Any) -> list[Any]:
        store.set(f"{prefix}/{step}/{rank}", json.dumps(value))
        return [json.loads(store.get(f"{prefix}/{step}/{r}")) for r in range(world_size)]

    return exchange


def exchange_by_group(group: Any) -> Exchange:
    """Exchange values through a torch.distributed group; one of gloo keeps the GPU out of it."""

    def exchange(step: str, value: Any) -> list[Any]:
        values = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(values, value, group=group)
        return values

    return exchange


class OneShotAllReduce:
    """One rank's end. All ranks construct theirs at the same time, and get all of them or an error.

    Args:
        rank, world_size: 2 to 8 ranks; 2 is what it is made for.
        exchange: how ranks tell each other names and handles, at setup only.
        tier: where the lines go; the same on all ranks.
        device: the CUDA device of this rank; None for the current one.
        max_bytes: of a call, a multiple of 256, at most 524288.
        deadline_s: how long a kernel waits, above 0.
        eager_deadline_s: the same of calls that are not captured in a CUDA graph; None for
            deadline_s. Between them a rank may compile, which a graph never does.
        hash_every: of so many calls one is hashed, for `check`; 0 for none.
        first_generation: for tests of the wrap-around; not 0.
        library: None for the one of `make kernels`.
    Raises:
        ValueError: an argument is not as above.
        RuntimeError: the library is not built; a rank cannot map or register its memory. All ranks
            raise, with what the first of them met.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        exchange: Exchange,
        tier: Tier = Tier.HOST_PINNED,
        device: torch.device | None = None,
        max_bytes: int = abi.MAX_BYTES,
        deadline_s: float = 2.0,
        eager_deadline_s: float | None = None,
        hash_every: int = HASH_EVERY,
        first_generation: int = 1,
        library: Library | None = None,
    ) -> None:
        check_setup(rank, world_size, max_bytes, deadline_s, hash_every, first_generation)
        self.rank, self.world_size, self.max_bytes = rank, world_size, max_bytes
        self.tier, self.device = Tier(tier), device
        self.deadline_s = deadline_s
        self.set_eager_deadline(deadline_s if eager_deadline_s is None else eager_deadline_s)
        self._exchange = exchange
        self._undo: list[Callable[[], object]] = []
        try:
            self._library = self._agree("library", lambda: library or abi.load())
            self._set_up(first_generation, hash_every)
        except BaseException:
            self.close()
            raise
        self.id = next(_IDS)
        _COMMUNICATORS[self.id] = self

    # -------------------------------------------------------------------------------- calls

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of `x` over the ranks, added in FP32 in the order of ranks and rounded once.

        Args:
            x: BF16, contiguous, on this rank's device, at a 16-byte address; its size in bytes a
                multiple of 16 and at most max_bytes. The same size on all ranks.
            out: as `x`, another tensor; made when None.
        Returns:
            `out`: the same bits on all ranks. Invalid once `check` raises.
        Raises:
            ValueError: an argument is not as above.
            RuntimeError: CUDA refuses the launch.
        """
        out = torch.empty_like(x) if out is None else out
        _ALL_REDUCE(x, self.id, out)
        return out

    def set_eager_deadline(self, deadline_s: float) -> None:
        """Set how long the kernels of later calls wait that are not captured in a CUDA graph.

        Raises:
            ValueError: it is out of range.
        """
        check_deadline(deadline_s)
        self.eager_deadline_s = deadline_s

    def launch(
        self, x: int, out: int, num_bytes: int, stream: int | None, captured: bool = False
    ) -> None:
        """Launch on addresses, unchecked but for what the library refuses."""
        args = self._args
        args.input, args.out, args.num_bytes = x, out, num_bytes
        args.deadline_ns = round((self.deadline_s if captured else self.eager_deadline_s) * 1e9)
        self._library.call("dsv4_allreduce", ctypes.byref(args), stream)

    # -------------------------------------------------------------------------------- state

    def expired(self) -> Expired | None:
        """This rank's record, else that of another rank that gave up; None while all is well."""
        for rank in (self.rank, *(r for r in range(self.world_size) if r != self.rank)):
            record = self._control(rank).record
            if record.written:
                fields = {name: getattr(record, name) for name in _EXPIRED_FIELDS}
                seen = (record.seen[0], record.seen[1])
                return Expired(**fields, seen=seen, waited_s=record.waited_ns / 1e9)
        return None

    def mismatch(self) -> Mismatch | None:
        """A hashed call of which two ranks hold different sums; None while all is well."""
        mine = self._hashes(self.rank)
        for rank in (r for r in range(self.world_size) if r != self.rank):
            theirs = self._hashes(rank)
            for generation in sorted(mine.keys() & theirs.keys()):
                if mine[generation] != theirs[generation]:
                    hashes = (mine[generation], theirs[generation])
                    return Mismatch(generation, (self.rank, rank), hashes)
        return None

    def check(self) -> None:
        """Raise if a wait passed the deadline, or if the hashes of a call differ between ranks.

        Reads host memory: costs no wait for the device.

        Raises:
            RuntimeError: who waited for what, or which sums differ, one line.
        """
        if fault := self.expired() or self.mismatch():
            raise RuntimeError(str(fault))

    @property
    def completed(self) -> int:
        """Generation of this rank's last call that ended well, 0 before it. For watchdogs."""
        return self._control(self.rank).completed

    def close(self) -> None:
        """Give the memory back, once no call is running on any rank. Twice is once."""
        _COMMUNICATORS.pop(getattr(self, "id", -1), None)
        while self._undo:
            self._undo.pop()()

    # -------------------------------------------------------------------------------- setup

    def _set_up(self, first_generation: int, hash_every: int) -> None:
        library, inbox_bytes = (
            self._library,
            self._library.inbox_bytes(self.world_size, self.max_bytes),
        )
        settings = [self.world_size, self.max_bytes, self.tier.value, hash_every]
        by_rank = self._exchange("same", settings)
        if any(other != settings for other in by_rank):
            raise ValueError(f"{OP}: world_size, max_bytes, tier, hash_every are {by_rank} by rank")

        shared_inboxes = self.world_size if self.tier is Tier.HOST_PINNED else 0
        region_bytes = self.world_size * abi.PAGE_BYTES + shared_inboxes * inbox_bytes
        self._region = region = self._share(region_bytes)
        self._undo.append(region.close)
        base = self._agree("register", lambda: library.host_register(region.address, region_bytes))
        self._undo.append(lambda: library.call("dsv4_host_unregister", region.address))

        state = self._agree("state", lambda: self._alloc(ctypes.sizeof(State)))
        first = State(generation=first_generation)
        size_bytes = ctypes.sizeof(first)
        self._agree(
            "write",
            lambda: library.call("dsv4_device_write", state, ctypes.byref(first), size_bytes),
        )
        if self.tier is Tier.HOST_PINNED:
            inboxes = base + self.world_size * abi.PAGE_BYTES
            inbox = [inboxes + r * inbox_bytes for r in range(self.world_size)]
        else:
            inbox = self._peer_inboxes(inbox_bytes)
        self._args = AllReduceArgs(
            state=state,
            control=base + self.rank * abi.PAGE_BYTES,
            max_bytes=self.max_bytes,
            rank=self.rank,
            world_size=self.world_size,
            hash_every=hash_every,
        )
        self._args.inbox[: self.world_size] = inbox
        self._exchange("ready", True)  # no rank stores before all inboxes are there

    def _share(self, size_bytes: int) -> SharedRegion:
        made: list[SharedRegion] = []

        def create() -> str | None:
            if self.rank == 0:
                made.append(SharedRegion.create(size_bytes))
                return made[0].name
            return None

        try:
            name = self._agree("region", create, everyone=True)[0]
            return self._agree(
                "map", lambda: made[0] if made else SharedRegion.open(name, size_bytes)
            )
        finally:
            if made:
                made[0].unlink()

    def _alloc(self, size_bytes: int) -> int:
        library, pointer = self._library, self._library.device_alloc(size_bytes)
        self._undo.append(lambda: library.call("dsv4_device_free", pointer))
        return pointer

    def _peer_inboxes(self, inbox_bytes: int) -> list[int]:
        library = self._library
        mine = self._agree("inbox", lambda: self._alloc(inbox_bytes))
        handles = self._agree("export", lambda: library.ipc_export(mine), everyone=True)

        def open_all() -> list[int]:
            inbox = []
            for rank, handle in enumerate(handles):
                pointer = mine if rank == self.rank else library.ipc_open(handle)
                inbox.append(pointer)
                if rank != self.rank:
                    self._undo.append(lambda p=pointer: library.call("dsv4_ipc_close", p))
            return inbox

        return self._agree("open", open_all)

    def _agree(self, step: str, function: Callable[[], Any], everyone: bool = False) -> Any:
        """Run it on every rank; where it fails on one, raise on all: none waits for a dead setup.

        Returns:
            Its value, or with `everyone` those of all ranks (JSON values only).
        """
        failure = value = None
        try:
            with _current(self.device):
                value = function()
        except Exception as error:  # noqa: BLE001  the others wait for the answer
            failure = str(error) or repr(error)
        told = self._exchange(step, [failure, value if everyone else None])
        for rank, (message, _) in enumerate(told):
            if message is not None:
                raise RuntimeError(f"{OP}: setup, {step}: rank {rank}: {message}")
        return [other for _, other in told] if everyone else value

    def _hashes(self, rank: int) -> dict[int, int]:
        """Generation -> hash of that rank's last hashed calls."""
        entries = [entry for entry in self._control(rank).hash if entry]
        return {entry & 0xFFFFFFFF: entry >> 32 for entry in entries}

    def _control(self, rank: int) -> Control:
        return Control.from_address(self._region.address + rank * abi.PAGE_BYTES)


_EXPIRED_FIELDS = ("rank", "source", "operation", "generation", "expected", "block", "line")
_EXPIRED_FIELDS += ("num_bytes",)
_IDS = itertools.count()
_COMMUNICATORS: dict[int, OneShotAllReduce] = {}


# ----------------------------------------------------------------------------------- checks


def check_setup(
    rank: int,
    world_size: int,
    max_bytes: int,
    deadline_s: float,
    hash_every: int,
    first_generation: int,
) -> None:
    """Check what a communicator is made of.

    Raises:
        ValueError: operation, values and rule.
    """
    if not 2 <= world_size <= abi.MAX_RANKS:
        raise ValueError(f"{OP}: world_size = {world_size}; it must be 2 .. {abi.MAX_RANKS}")
    if not 0 <= rank < world_size:
        raise ValueError(f"{OP}: rank = {rank}; it must be 0 .. {world_size - 1}")
    if not 0 < max_bytes <= abi.MAX_BYTES or max_bytes % abi.MAX_BYTES_MULTIPLE:
        raise ValueError(
            f"{OP}: max_bytes = {max_bytes}; it must be a multiple of {abi.MAX_BYTES_MULTIPLE}, "
            f"{abi.MAX_BYTES_MULTIPLE} .. {abi.MAX_BYTES}"
        )
    check_deadline(deadline_s)
    if not 0 <= hash_every < 2**31:
        raise ValueError(f"{OP}: hash_every = {hash_every}; it must be 0 .. 2**31 - 1")
    if not 1 <= first_generation < 2**32:
        raise ValueError(f"{OP}: first_generation = {first_generation}; it must be 1 .. 2**32 - 1")


def check_deadline(deadline_s: float, name: str = "deadline_s") -> None:
    """Check a deadline in seconds.

    Raises:
        ValueError: operation, value and rule.
    """
    if not (math.isfinite(deadline_s) and 1e-3 <= deadline_s <= MAX_DEADLINE_S):
        raise ValueError(f"{OP}: {name} = {deadline_s}; it must be 0.001 .. {MAX_DEADLINE_S}")


def check_call(x: torch.Tensor, out: torch.Tensor, max_bytes: int) -> int:
    """Check the tensors of a call, all but the kind of device.

    Returns:
        The message's bytes.
    Raises:
        ValueError: operation, values and rule.
    """
    for name, tensor in (("x", x), ("out", out)):
        if tensor.dtype is not torch.bfloat16:
            wrong = f"dtype {tensor.dtype}; torch.bfloat16 is needed"
        elif tensor.shape != x.shape:
            wrong = f"shape {tuple(tensor.shape)}; that of x is {tuple(x.shape)}"
        elif not tensor.is_contiguous():
            wrong = f"shape {tuple(tensor.shape)}, stride {tensor.stride()}; it must be contiguous"
        elif tensor.device != x.device:
            wrong = f"device {tensor.device}, x {x.device}; one device is needed"
        elif tensor.data_ptr() % abi.SIZE_MULTIPLE:
            wrong = f"address {tensor.data_ptr():#x}; it must be a multiple of 16 bytes"
        else:
            continue
        raise ValueError(f"{OP}: {name} has {wrong}")
    num_bytes = 2 * x.numel()
    if num_bytes % abi.SIZE_MULTIPLE or num_bytes > max_bytes:
        raise ValueError(
            f"{OP}: x has {num_bytes} bytes; the size must be a multiple of {abi.SIZE_MULTIPLE} "
            f"and at most {max_bytes}"
        )
    if num_bytes and x.data_ptr() == out.data_ptr():
        raise ValueError(f"{OP}: out is x; it must be another tensor")
    return num_bytes


# ------------------------------------------------------------------------------ registration


def _current(device: torch.device | None) -> Any:
    """Makes a device current; None leaves the one that is."""
    return contextlib.nullcontext() if device is None else torch.cuda.device(device)


def _all_reduce(x: torch.Tensor, communicator: int, out: torch.Tensor) -> None:
    end = _COMMUNICATORS.get(communicator)
    if end is None:
        raise ValueError(f"{OP}: communicator = {communicator}; there is none, or it is closed")
    num_bytes = check_call(x, out, end.max_bytes)
    if x.device.type != "cuda":
        raise ValueError(f"{OP}: the tensors are on {x.device}; a CUDA device is needed")
    if end.device is not None and x.device != end.device:
        raise ValueError(f"{OP}: x is on {x.device}; this communicator is made for {end.device}")
    stream = torch.cuda.current_stream(x.device).cuda_stream
    with torch.cuda.device(x.device):
        captured = torch.cuda.is_current_stream_capturing()
        end.launch(x.data_ptr(), out.data_ptr(), num_bytes, stream, captured)


def _register() -> torch.library.Library:
    library = torch.library.Library("dsv4_maxq", "FRAGMENT")
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    library.define(f"{OP}(Tensor x, int communicator, Tensor(a!) out) -> ()", tags=tags)
    library.impl(OP, _all_reduce, "CUDA")
    library.impl(OP, _all_reduce, "CPU")  # to refuse: with our message, not the dispatcher's
    torch.library.register_fake(f"dsv4_maxq::{OP}", lambda *_: None, lib=library)
    return library


_REGISTERED = _register()  # the operator lives as long as this object
_ALL_REDUCE = torch.ops.dsv4_maxq.all_reduce_oneshot.default
