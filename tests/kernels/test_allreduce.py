"""The all-reduce's protocol, run by host threads and processes from the kernel's own sources."""

from __future__ import annotations

import ctypes
import json
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kernels import allreduce, build
from kernels import allreduce_abi as abi
from kernels.allreduce import OneShotAllReduce, Tier, check_call, check_setup, exchange_by_store
from tests.kernels.emulated_links import build_emulation, no_region_left

PROCESS = Path(__file__).with_name("allreduce_process.py")
SMALL_MAX = 4096  # bytes: 512 lines, 16 windows


@pytest.fixture(scope="session")
def emulation(tmp_path_factory) -> Path:
    return build_emulation(tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def library(emulation) -> abi.Library:
    return abi.load(emulation)


# ------------------------------------------------------------------------- two processes


def run_ranks(
    emulation, tmp_path, sizes, tier="host-pinned", world_size=2, faults=None, link=None, **options
):
    """Run every rank in a process of its own; their results, None for one that died.

    `faults` are what a rank does, `link` is what the emulation does to rank 0's stores.
    """
    common = {"world_size": world_size, "tier": tier, "library": str(emulation), "sizes": sizes}
    common |= {"store": str(tmp_path / "store"), "deadline_s": 20.0, **options}
    with no_region_left():
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    PROCESS,
                    json.dumps({**common, "rank": r, **(faults or {}).get(r, {})}),
                ],
                stdout=subprocess.PIPE,
                cwd=build.ROOT,
                env={"PYTHONPATH": str(build.ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
                | ({"EMULATED_FAULT": link} if link and r == 0 else {}),
            )
            for r in range(world_size)
        ]
        results = []
        try:
            for process in processes:
                text, _ = process.communicate(timeout=180)
                results.append(json.loads(text) if process.returncode == 0 else None)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return results


@pytest.mark.parametrize("tier", [t.value for t in Tier])
def test_ranks_get_the_rounded_sum_and_the_same_bits_at_every_size(emulation, tmp_path, tier):
    sizes = [16, 32, 48, 1024, 8192, 12304, 65536, 262144, 524288]
    sizes += random.Random(0).choices(range(16, 9000, 16), k=24)
    a, b = run_ranks(emulation, tmp_path, sizes, tier)
    assert (a["error"], b["error"]) == (None, None)
    assert (a["wrong"], b["wrong"]) == ([], [])
    assert len(a["hashes"]) == len(sizes)
    assert a["hashes"] == b["hashes"]
    assert a["completed"] == len(sizes)


def test_three_ranks_add_in_one_order(emulation, tmp_path):
    results = run_ranks(emulation, tmp_path, [16, 4096, 512, 8192] * 3, world_size=3)
    assert [r["wrong"] for r in results] == [[], [], []]
    assert results[0]["hashes"] == results[1]["hashes"] == results[2]["hashes"]


def test_results_are_right_across_the_wrap_of_generations(emulation, tmp_path):
    sizes = [16, 4096, 256, 4096, 1024, 64, 4096, 2048] * 2
    a, b = run_ranks(emulation, tmp_path, sizes, first_generation=2**32 - 6, max_bytes=SMALL_MAX)
    assert (a["wrong"], b["wrong"], a["error"]) == ([], [], None)
    assert len(a["hashes"]) == len(sizes)
    assert (
        a["generation"] == 2 + len(sizes) - 6
    )  # 0 and 1 are left out: the slots go on alternating


def test_a_late_peer_is_waited_for(emulation, tmp_path):
    a, b = run_ranks(emulation, tmp_path, [64] * 4, faults={1: {"faults": {2: 0.5}}})
    assert (a["wrong"], b["wrong"], a["error"], b["error"]) == ([], [], None, None)


@pytest.mark.parametrize("tier", [t.value for t in Tier])
def test_a_killed_peer_is_reported_within_the_deadline(emulation, tmp_path, tier):
    faults = {0: {"deadlines": {3: 1.0}}, 1: {"faults": {3: "kill"}}}
    a, b = run_ranks(emulation, tmp_path, [8192] * 6, tier, faults=faults)
    assert b is None
    assert len(a["hashes"]) == 3
    assert 1.0 <= a["seconds"] < 20  # the peer is dead: without a deadline it would be for ever
    said = r"rank 0 waited \d+\.\d\d s for rank 1: generation 4, 8192 bytes, line "
    assert re.search(said, a["error"])
    assert "\n" not in a["error"]


def test_a_peer_that_skips_a_call_is_reported(emulation, tmp_path):
    faults = {0: {"deadlines": {5: 1.0}}, 1: {"faults": {4: "skip"}}}
    a, b = run_ranks(emulation, tmp_path, [64] * 6, faults=faults)
    assert re.search(r"rank 0 waited \d+\.\d\d s for rank 1: generation 6, ", a["error"])
    assert "expected 6, seen 4 and 4" in a["error"]
    assert a["wrong"] == [4]  # equal sizes: the next call's data passes for this one's


def test_data_that_the_link_changed_is_a_fault_on_both_ranks(emulation, tmp_path):
    options = {"tier": "peer-push", "hash_every": 4, "link": f"corrupt:{6 * 1024 + 77}"}
    a, b = run_ranks(emulation, tmp_path, [8192] * 9, **options)
    assert (a["wrong"], b["wrong"]) == ([], [6])  # call 6 has generation 7, which is not hashed
    assert (a["error"], b["error"]) == (None, None)
    options["link"] = f"corrupt:{7 * 1024 + 77}"
    a, b = run_ranks(emulation, tmp_path, [8192] * 9, **options)
    assert (a["wrong"], b["wrong"]) == ([], [7])
    assert (a["mismatch"], b["mismatch"]) == (8, 8)
    assert a["error"].startswith("all_reduce_oneshot: ranks 0 and 1 hold different sums of gener")
    assert a["error"].endswith("the link gives wrong data, results are invalid")


# ------------------------------------------------------- one rank, the peer's lines by hand


@dataclass
class Hand:
    """Rank 0 with an emulated library; the test writes the lines of rank 1."""

    end: OneShotAllReduce
    inbox: ctypes.Array  # [2][lines][4] words, of rank 0
    sent: ctypes.Array  # what rank 0 sends to rank 1

    @property
    def lines(self) -> int:
        return self.end.max_bytes // 8

    def write(self, generation: int, payload: list[int], flags=None, first=0) -> None:
        """Lines of `generation`, two words of payload each; other flags where they are given."""
        base = (generation % 2) * self.lines + first
        for i in range(len(payload) // 2):
            low, high = flags or (generation, generation)
            words = (payload[2 * i], low, payload[2 * i + 1], high)
            self.inbox[4 * (base + i) : 4 * (base + i) + 4] = words

    def call(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(x, float("nan"))
        self.end.launch(x.data_ptr(), out.data_ptr(), 2 * x.numel(), None)
        return out


@pytest.fixture
def hand(library):
    made = []

    def make(deadline_s=0.2, first_generation=1, max_bytes=SMALL_MAX) -> Hand:
        def exchange(step, value):
            return [value, value]

        end = OneShotAllReduce(
            0,
            2,
            exchange,
            max_bytes=max_bytes,
            deadline_s=deadline_s,
            first_generation=first_generation,
            library=library,
        )
        made.append(end)
        words = ctypes.c_uint32 * (library.inbox_bytes(2, max_bytes) // 4)
        return Hand(end, *(words.from_address(end._args.inbox[r]) for r in range(2)))

    yield make
    for end in made:
        end.close()


ONE = 0x3F803F80  # two BF16 ones
TWO = 0x40004000
X = torch.full((8,), 2.0, dtype=torch.bfloat16)  # two lines


def test_a_line_is_payload_and_generation_twice(hand):
    rank0 = hand()
    rank0.write(1, [ONE] * 4)
    assert rank0.call(X).tolist() == [3.0] * 8
    slot = rank0.lines * 4  # generation 1: the second
    assert list(rank0.sent[slot : slot + 8]) == [TWO, 1, TWO, 1] * 2
    assert not any(rank0.sent[:slot])


@pytest.mark.parametrize("lines", [2, 4, 12, 14, 24, 26, 36, 512])
def test_a_line_that_is_there_is_loaded_once_and_no_other(hand, library, lines):
    """Threads that also looked at the last line made 64 KB thirty times as slow as 128 KB."""
    loads = library.functions.emulated_loads
    loads.restype = ctypes.c_long
    rank0 = hand()
    rank0.write(1, [ONE] * (2 * lines))
    before = loads()
    assert rank0.call(torch.full((4 * lines,), 2.0, dtype=torch.bfloat16)).eq(3).all()
    assert loads() - before == lines


@pytest.mark.parametrize("flags", [(1, 0), (0, 1)])
def test_a_torn_line_is_not_taken(hand, flags):
    rank0 = hand()
    rank0.write(1, [ONE] * 4)
    rank0.write(1, [ONE] * 2, flags, first=1)
    out = rank0.call(X)
    assert out[4:].isnan().all()
    expired = rank0.end.expired()
    assert (expired.line, expired.expected, expired.seen) == (1, 1, flags)


def test_a_torn_line_is_taken_once_it_is_whole(hand):
    rank0 = hand(deadline_s=60)
    rank0.write(1, [ONE] * 2)
    rank0.write(1, [0xDEAD, ONE], (0, 1), first=1)

    def complete():
        time.sleep(0.1)
        rank0.write(1, [ONE] * 2, first=1)

    thread = threading.Thread(target=complete)
    thread.start()
    assert rank0.call(X).tolist() == [3.0] * 8
    thread.join()


@pytest.mark.parametrize("stale", [1, 5, 2**32 - 1])
def test_a_line_of_another_generation_in_the_slot_is_not_taken(hand, stale):
    rank0 = hand(first_generation=3)
    rank0.write(3, [ONE] * 4, (stale, stale))
    assert rank0.call(X).isnan().all()
    assert rank0.end.expired().seen == (stale, stale)


def test_an_empty_line_is_of_no_generation(hand, library):
    following = library.functions.emulated_next_generation
    following.argtypes, following.restype = [ctypes.c_uint32], ctypes.c_uint32
    for g in (1, 2, 2**31 - 1, 2**31, 2**32 - 3, 2**32 - 2, 2**32 - 1):
        assert following(g) not in (0, g)
        assert following(g) % 2 != g % 2


def test_lines_of_longer_messages_are_cleared_long_before_their_generation_returns(hand):
    rank0 = hand()
    for slot in range(2):
        rank0.write(slot, [ONE] * (2 * rank0.lines), (2**31 + 7, 2**31 + 7))
    windows = rank0.lines // 32
    for generation in range(1, 32 * windows + 33):
        rank0.write(generation, [ONE] * 4)
        assert rank0.call(X).tolist() == [3.0] * 8
    flags = rank0.inbox[1::4]
    assert 2**31 + 7 not in set(flags)
    assert set(flags[2 : rank0.lines]) | set(flags[rank0.lines + 2 :]) == {0}


def test_lines_of_the_running_message_are_never_cleared(hand):
    rank0 = hand(first_generation=31)
    x = torch.full((SMALL_MAX // 2,), 2.0, dtype=torch.bfloat16)
    for generation in range(31, 31 + 70):
        rank0.write(generation, [ONE] * (2 * rank0.lines))
        assert rank0.call(x).eq(3.0).all()
        slot = rank0.lines * 4 * (generation % 2)
        assert set(rank0.inbox[slot + 1 : slot + 4 * rank0.lines : 4]) == {generation}


def test_after_the_deadline_later_calls_wait_for_nothing_and_send_nothing(hand, library):
    loads = library.functions.emulated_loads
    loads.restype = ctypes.c_long
    rank0 = hand(deadline_s=0.5)
    start = time.monotonic()
    rank0.call(X)
    assert 0.5 <= time.monotonic() - start < 60
    first = str(rank0.end.expired())
    before, loads_before = list(rank0.sent), loads()
    rank0.write(2, [ONE] * 4)
    assert rank0.call(X).isnan().all()
    assert list(rank0.sent) == before
    assert loads() == loads_before  # whoever waits looks
    with pytest.raises(RuntimeError) as caught:
        rank0.end.check()
    assert str(caught.value) == first


def test_the_record_names_who_waited_for_what(hand):
    rank0 = hand(deadline_s=0.2, first_generation=7)
    rank0.write(7, [ONE] * 2)
    rank0.write(7, [ONE] * 2, (5, 5), first=1)
    rank0.call(X)
    expired = rank0.end.expired()
    assert (expired.rank, expired.source, expired.operation) == (0, 1, 1)
    assert (expired.generation, expired.expected, expired.seen) == (7, 7, (5, 5))
    assert (expired.line, expired.num_bytes) == (1, 16)
    assert 0.2 <= expired.waited_s < 60
    with pytest.raises(
        RuntimeError,
        match=r"^all_reduce_oneshot: rank 0 waited \d+\.\d\d s for rank 1: generation 7, 16 bytes, "
        r"line 1 of 2, block \d: expected 7, seen 5 and 5; results since are invalid",
    ):
        rank0.end.check()


def test_the_record_of_another_rank_is_seen_too(hand):
    rank0 = hand()
    record = rank0.end._control(1).record
    record.rank, record.written = 1, 1
    with pytest.raises(RuntimeError, match="rank 1 waited 0.00 s for rank 0"):
        rank0.end.check()


def test_nan_and_infinity_and_ties_round_as_torch_does(library):
    values = torch.tensor([1.00390625, 1.01171875, -0.0, 1e-40, 3.4e38, float("inf")])
    packed = (ctypes.c_uint32 * 3)()
    source = (ctypes.c_float * 6)(*values.tolist())
    library.functions.emulated_round(source, packed, 3)
    got = torch.frombuffer(bytearray(packed), dtype=torch.bfloat16)
    assert torch.equal(got, values.to(torch.bfloat16))
    source = (ctypes.c_float * 2)(float("nan"), 1.0)
    library.functions.emulated_round(source, packed, 1)
    assert packed[0] == 0x3F807FFF


# ------------------------------------------------------------------------------- host side


def header_constant(name: str) -> int:
    for line in (build.CSRC / "allreduce.h").read_text().splitlines():
        if line.startswith(f"#define {name} "):
            return eval(line.split("//")[0].split(None, 2)[2], {})  # noqa: S307
    raise AssertionError(name)


def test_constants_and_layouts_are_those_of_the_header(tmp_path, emulation):
    assert header_constant("DSV4_MAX_RANKS") == abi.MAX_RANKS
    assert header_constant("DSV4_ALLREDUCE_MAX_BYTES") == abi.MAX_BYTES
    assert header_constant("DSV4_IPC_HANDLE_BYTES") == abi.IPC_HANDLE_BYTES
    assert header_constant("DSV4_PROBE_FLAG_STRIDE") == abi.FLAG_STRIDE
    assert header_constant("DSV4_HASH_ENTRIES") == abi.HASH_ENTRIES
    structures = {
        "Dsv4WaitRecord": abi.WaitRecord,
        "Dsv4Control": abi.Control,
        "Dsv4State": abi.State,
        "Dsv4AllReduceArgs": abi.AllReduceArgs,
        "Dsv4ProbeResult": abi.ProbeResult,
        "Dsv4ProbeArgs": abi.ProbeArgs,
    }
    lines = ['#include "allreduce.h"', "#include <stdio.h>", "int main(void) {"]
    expected = []
    for name, structure in structures.items():
        lines.append(f'printf("%zu\\n", sizeof({name}));')
        expected.append(ctypes.sizeof(structure))
        for field, *_ in structure._fields_:
            member = {"input": "in"}.get(field, field)
            lines.append(f'printf("%zu\\n", offsetof({name}, {member}));')
            expected.append(getattr(structure, field).offset)
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text("\n".join([*lines, "return 0; }"]))
    command = ["g++", "-x", "c", f"-I{build.CSRC}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    text = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert [int(word) for word in text.split()] == expected


@pytest.mark.parametrize(
    ("world_size", "max_bytes", "size"),
    [
        (2, 512 * 1024, 2 * 1024 * 1024),
        (8, 256, 2 * 7 * 32 * 16),
        (1, 256, 0),
        (9, 256, 0),
        (2, 0, 0),
        (2, 264, 0),
        (2, 1024 * 1024, 0),
    ],
)
def test_an_inbox_has_two_slots_of_lines_per_source(library, world_size, max_bytes, size):
    assert library.inbox_bytes(world_size, max_bytes) == size


@pytest.mark.parametrize(
    ("num_bytes", "blocks"), [(16, 1), (2048, 1), (2064, 2), (8192, 4), (32768, 16), (524288, 16)]
)
def test_few_blocks_whatever_the_size(library, num_bytes, blocks):
    args = abi.AllReduceArgs(num_bytes=num_bytes)
    assert library.functions.emulated_blocks(ctypes.byref(args)) == blocks


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (bf16(8).half(), bf16(8), "x has dtype torch.float16; torch.bfloat16 is needed"),
        (bf16(8), bf16(8).float(), "out has dtype torch.float32; torch.bfloat16 is needed"),
        (bf16(8), bf16(16), r"out has shape \(16,\); that of x is \(8,\)"),
        (bf16(8, 8).t(), bf16(8, 8), r"stride \(1, 8\); it must be contiguous"),
        (bf16(16)[1:9], bf16(8), "address 0x.*; it must be a multiple of 16 bytes"),
        (bf16(9), bf16(9), "x has 18 bytes; the size must be a multiple of 16 and at most 4096"),
        (bf16(2056), bf16(2056), "x has 4112 bytes; the size must be .* at most 4096"),
    ],
)
def test_wrong_tensors_are_refused_in_one_line(x, out, message):
    with pytest.raises(ValueError, match=f"^all_reduce_oneshot: .*{message}$") as caught:
        check_call(x, out, 4096)
    assert "\n" not in str(caught.value)


def test_out_must_not_be_x():
    x = bf16(8)
    with pytest.raises(ValueError, match="out is x; it must be another tensor"):
        check_call(x, x, 4096)
    assert check_call(x, bf16(8), 4096) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 1}, r"world_size = 1; it must be 2 \.\. 8"),
        ({"world_size": 9}, r"world_size = 9; it must be 2 \.\. 8"),
        ({"rank": 2}, r"rank = 2; it must be 0 \.\. 1"),
        ({"rank": -1}, "rank = -1"),
        ({"max_bytes": 0}, "max_bytes = 0; it must be a multiple of 256, 256"),
        ({"max_bytes": 300}, "max_bytes = 300"),
        ({"max_bytes": 2**20}, r"max_bytes = 1048576; .* 524288"),
        ({"deadline_s": 0}, "deadline_s = 0; it must be"),
        ({"deadline_s": float("nan")}, "deadline_s = nan"),
        ({"hash_every": -1}, r"hash_every = -1; it must be 0 \.\. "),
        ({"first_generation": 0}, "first_generation = 0"),
    ],
)
def test_a_wrong_setup_is_refused_in_one_line(change, message):
    good = {"rank": 0, "world_size": 2, "max_bytes": 256, "deadline_s": 2, "hash_every": 0}
    good |= {"first_generation": 1}
    check_setup(**good)
    with pytest.raises(ValueError, match=f"^all_reduce_oneshot: {message}"):
        check_setup(**{**good, **change})


def test_the_operator_refuses_the_cpu_and_a_closed_communicator(hand):
    end = hand().end
    with pytest.raises(ValueError, match="the tensors are on cpu; a CUDA device is needed"):
        end.all_reduce(X)
    end.close()
    with pytest.raises(ValueError, match="communicator = .*; there is none, or it is closed"):
        end.all_reduce(X)


def test_the_operator_can_be_traced():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(8, dtype=torch.bfloat16, device="cuda")
        assert torch.ops.dsv4_maxq.all_reduce_oneshot(x, 0, torch.empty_like(x)) is None


def together(library, options):
    """Construct two ranks in two threads; what each raised."""
    store = torch.distributed.HashStore()
    errors: list[Exception | None] = [None, None]

    def construct(rank):
        try:
            exchange = exchange_by_store(store, rank, 2)
            OneShotAllReduce(rank, 2, exchange, library=library, **options[rank]).close()
        except (RuntimeError, ValueError) as error:
            errors[rank] = error

    threads = [threading.Thread(target=construct, args=(rank,)) for rank in range(2)]
    with no_region_left():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    return errors


def test_ranks_that_disagree_are_refused_on_both(library):
    errors = together(library, [{"max_bytes": 256}, {"max_bytes": 512}])
    for error in errors:
        assert "[[2, 256, 'host-pinned', 1024], [2, 512, 'host-pinned', 1024]] by rank" in str(
            error
        )


def test_a_full_dev_shm_is_an_error_on_both_ranks(library, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(abi.os, "posix_fallocate", full)
    errors = together(library, [{}, {}])
    for error in errors:
        assert "setup, region: rank 0: shared memory: /dev/shm has no " in str(error)


def test_a_failed_ipc_on_one_rank_is_an_error_on_both(library, monkeypatch):
    real = abi.Library.ipc_open

    def fail_once(self, handle, failed=[]):  # noqa: B006
        if not failed:
            failed.append(1)
            raise RuntimeError("dsv4_ipc_open: CUDA error 217")
        return real(self, handle)

    monkeypatch.setattr(abi.Library, "ipc_open", fail_once)
    errors = together(library, [{"tier": Tier.PEER_PUSH}] * 2)
    for error in errors:
        assert "setup, open: rank " in str(error)
        assert "CUDA error 217" in str(error)


@pytest.mark.parametrize(
    "failure",
    [RuntimeError("dsv4_device_write: CUDA error 700"), AttributeError("no device"), OSError()],
)
def test_a_failed_write_on_one_rank_is_an_error_on_both(library, monkeypatch, failure):
    """Whatever failed, and if it has no words for it."""
    real = abi.Library.call

    def fail_once(self, name, *arguments, failed=[]):  # noqa: B006
        if name == "dsv4_device_write" and not failed:
            failed.append(1)
            raise failure
        return real(self, name, *arguments)

    monkeypatch.setattr(abi.Library, "call", fail_once)
    for error in together(library, [{}, {}]):
        assert "setup, write: rank " in str(error)
        assert (str(failure) or "OSError()") in str(error)


def test_without_a_library_both_ranks_say_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setenv(build.FOLDER_ENV, str(tmp_path))
    abi.load.cache_clear()
    errors = together(None, [{}, {}])
    for error in errors:
        assert "is not built; run `make kernels`" in str(error)


def test_groups_exchange_in_the_order_of_ranks(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        exchange = allreduce.exchange_by_group(torch.distributed.group.WORLD)
        assert exchange("step", {"a": 1}) == [{"a": 1}]
    finally:
        torch.distributed.destroy_process_group()
