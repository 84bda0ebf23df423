"""Prove a link between two GPUs by loads and stores of kernels, with checked values.

    python -m kernels.probe [--devices 0,1] [--out FILE]

Two processes, one per GPU, exchange changing 16-byte patterns and flags: small and large messages,
either way, in three arms. `peer-push` stores into the peer's memory over CUDA IPC, `peer-pull`
loads from it, `host-pinned` is the control: a registered region of /dev/shm, without peer access.
What the driver or a memcpy says of a link proves nothing; these kernels do what an all-reduce does.

Every wait in the kernels has a deadline, every step of the processes a timeout, after which both
are killed. A verdict holds for this boot, driver and pair of bus ids: they are the result's key.

Exit status 0: both peer arms healthy. 1: not, but the control arm is healthy or slow. 2: nor that.
3: the probe could not run. Needs the library of `make kernels`; neither torch nor vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from kernels import allreduce_abi as abi
from kernels.allreduce_abi import Library, ProbeArgs, ProbeResult, SharedRegion
from kernels.build import ROOT

SCHEMA_VERSION = 1
LINE_BYTES = 16
DIRECTIONS = ((0, 1), (1, 0))


class Arm(StrEnum):
    """What carries data and flags."""

    PEER_PUSH = "peer-push"
    PEER_PULL = "peer-pull"
    HOST_PINNED = "host-pinned"


class Verdict(StrEnum):
    """From good to bad; that of several is the last of them."""

    HEALTHY = "healthy"
    SLOW = "slow"
    WRONG_DATA = "wrong data"
    HANG = "hang"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True)
class ProbeConfig:
    """What to probe, and how long.

    Raises:
        ValueError: not two devices, or a number that is too small.
    """

    devices: tuple[int, ...] = (0, 1)
    small_bytes: int = 8 * 1024
    large_bytes: int = 4 * 1024 * 1024
    small_rounds: int = 20_000
    large_rounds: int = 100
    large_blocks: int = 8
    deadline_s: float = 2.0  # of a wait in a kernel
    timeout_s: float = 60.0  # of a step of both processes
    # A broken path through system memory was seen 15 times slower than a good one; a good one does
    # 27 GB/s or more (PCIe 4.0 x16) and a few us. These limits lie far from both.
    slow_latency_us: float = 15.0
    slow_bandwidth_gb_s: float = 6.0
    library: Path | None = None  # None: the one of `make kernels`

    def __post_init__(self) -> None:
        if len(self.devices) != 2 or min(self.devices) < 0:
            raise ValueError(f"devices = {self.devices}; two are needed, such as 0,1")
        if self.small_bytes % LINE_BYTES or self.large_bytes % (LINE_BYTES * self.large_blocks):
            raise ValueError(
                f"small_bytes = {self.small_bytes}, large_bytes = {self.large_bytes}; multiples of "
                f"{LINE_BYTES} a block are needed"
            )
        if min(self.small_bytes, self.large_bytes, self.small_rounds, self.large_rounds) < 1:
            raise ValueError("probe: sizes and rounds must be at least 1")
        if not 0 < self.deadline_s < self.timeout_s:
            raise ValueError(
                f"deadline_s = {self.deadline_s}, timeout_s = {self.timeout_s}; the deadline must "
                "be above 0 and below the timeout"
            )

    @property
    def region_bytes(self) -> int:
        """Of one rank's region: flags, then data."""
        return FLAG_BYTES + max(self.small_bytes, self.large_bytes)


MAX_BLOCKS = 64
FLAG_BYTES = 2 * MAX_BLOCKS * abi.FLAG_STRIDE


@dataclass(frozen=True)
class Direction:
    """What one direction of an arm does; None where it was not measured."""

    latency_us: float | None = None  # one way: data of small_bytes and its flag
    bandwidth_gb_s: float | None = None  # of large_bytes


@dataclass
class ArmResult:
    """One arm: its verdict, why, and figures by direction, `0->1` and `1->0`."""

    arm: Arm
    verdict: Verdict = Verdict.HEALTHY
    reason: str = ""
    directions: dict[str, Direction] = field(default_factory=dict)


class ProbeImpossible(RuntimeError):
    """The probe cannot run at all; the message is one line."""


class Stuck(RuntimeError):
    """A step passed its timeout; which one."""


class Refused(RuntimeError):
    """A process answered with an error."""


# ----------------------------------------------------------------------------------- parent


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Run all arms, the control first; return the result as it is written.

    Raises:
        ProbeImpossible: no library, no such devices, no shared memory.
    """
    key = {"boot_id": boot_id(), "driver": driver_version(), "bus_ids": _bus_ids(config)}
    arms = [run_arm(config, arm) for arm in (Arm.HOST_PINNED, Arm.PEER_PUSH, Arm.PEER_PULL)]
    return {
        "schema_version": SCHEMA_VERSION,
        "key": key,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": {**asdict(config), "library": str(config.library) if config.library else None},
        "peer_verdict": worst(arm for arm in arms if arm.arm is not Arm.HOST_PINNED).value,
        "arms": [
            {**asdict(arm), "arm": arm.arm.value, "verdict": arm.verdict.value} for arm in arms
        ],
    }


def worst(arms: Any) -> Verdict:
    """The verdict of several arms together."""
    order = list(Verdict)
    return max((arm.verdict for arm in arms), key=order.index)


def exit_status(result: dict[str, Any]) -> int:
    """As the module says."""
    if result["peer_verdict"] == Verdict.HEALTHY:
        return 0
    [control] = [arm for arm in result["arms"] if arm["arm"] == Arm.HOST_PINNED]
    return 1 if control["verdict"] in (Verdict.HEALTHY, Verdict.SLOW) else 2


def run_arm(config: ProbeConfig, arm: Arm) -> ArmResult:
    """Run one arm with two processes of its own; both are dead when it returns."""
    result = ArmResult(arm)
    try:
        region = SharedRegion.create(2 * (config.region_bytes + abi.PAGE_BYTES))
    except RuntimeError as error:
        raise ProbeImpossible(f"probe: {error}") from error
    pair = None
    try:
        pair = Pair(config, region.name)
        _measure(config, arm, pair, result)
    except Stuck as error:
        result.verdict, result.reason = Verdict.HANG, str(error)
    except Refused as error:
        result.verdict, result.reason = Verdict.IMPOSSIBLE, str(error)
    finally:
        left = pair.kill() if pair else []
        region.unlink()
        region.close()
    if left:
        result.reason += f"; processes {left} do not die: reboot before anything else"
    return result


def _measure(config: ProbeConfig, arm: Arm, pair: Pair, result: ArmResult) -> None:
    peer = arm is not Arm.HOST_PINNED
    opened = pair.ask("open", [{"device": d, "peer": peer} for d in config.devices])
    if peer:
        pair.ask("map", [{"handle": opened[1 - rank]["handle"]} for rank in range(2)])
    small = (config.small_bytes, 1, config.small_rounds)
    large = (config.large_bytes, config.large_blocks, config.large_rounds)
    for sender, receiver in DIRECTIONS:
        name, figures = f"{sender}->{receiver}", {}
        for size, (num_bytes, num_blocks, rounds) in (("small", small), ("large", large)):
            where = f"{name}, {num_bytes} bytes"
            flag_s = 0.0
            if size == "small":  # there and back by flags alone: half of it is the way back
                flag_s = _run(config, arm, pair, sender, 0, 1, rounds, result, f"{name}, flags")
            if result.verdict is not Verdict.HEALTHY:
                return
            seconds = _run(config, arm, pair, sender, num_bytes, num_blocks, rounds, result, where)
            if result.verdict is not Verdict.HEALTHY:
                return
            if size == "small":
                figures["latency_us"] = 1e6 * max(seconds - flag_s / 2, 0.0)
                back_s = flag_s / 2
            else:
                figures["bandwidth_gb_s"] = num_bytes / max(seconds - back_s, 1e-9) / 1e9
            result.directions[name] = Direction(**figures)
    slow = [
        f"{name}: {d.latency_us:.1f} us, {d.bandwidth_gb_s:.1f} GB/s"
        for name, d in result.directions.items()
        if d.latency_us > config.slow_latency_us or d.bandwidth_gb_s < config.slow_bandwidth_gb_s
    ]
    if slow:
        result.verdict = Verdict.SLOW
        result.reason = (
            f"{'; '.join(slow)}; healthy is at most {config.slow_latency_us:g} us and at "
            f"least {config.slow_bandwidth_gb_s:g} GB/s"
        )


def _run(
    config: ProbeConfig,
    arm: Arm,
    pair: Pair,
    sender: int,
    num_bytes: int,
    num_blocks: int,
    rounds: int,
    result: ArmResult,
    where: str,
) -> float:
    """One launch on both; seconds of a round as the sender saw it. Sets a bad verdict."""
    lines = num_bytes // LINE_BYTES // num_blocks
    common = {"arm": arm.value, "lines": lines, "num_blocks": num_blocks, "rounds": rounds}
    common |= {"untimed_rounds": max(1, rounds // 10), "deadline_s": config.deadline_s}
    pair.ask("clear", [{}, {}])
    told = pair.ask("run", [{**common, "sends": rank == sender} for rank in range(2)])
    blocks = [(rank, block) for rank in range(2) for block in told[rank]["blocks"]]
    for rank, block in blocks:
        if block["wrong"]:
            result.verdict = Verdict.WRONG_DATA
            result.reason = (
                f"{where}: GPU {rank} read {_words(block['seen'])} where "
                f"{_words(block['expected'])} was sent: round {block['wrong_round']}, line "
                f"{block['wrong_line']}, {block['wrong']} times"
            )
            return 0.0
    for rank, block in blocks:
        if block["status"] != 1:
            result.verdict = Verdict.HANG
            result.reason = (
                f"{where}: GPU {rank} waited {config.deadline_s:g} s for flag "
                f"{block['rounds'] + 1} and saw {block['flag_seen']}"
            )
            return 0.0
    timed = [block["elapsed_ns"] for rank, block in blocks if rank == sender]
    return max(timed) / 1e9 / rounds


def _words(words: list[int]) -> str:
    return " ".join(f"{word:08x}" for word in words)


class Pair:
    """The two processes of an arm. They die with this process, whatever ends it."""

    def __init__(self, config: ProbeConfig, region: str) -> None:
        self._timeout_s = config.timeout_s
        self._children = []
        for rank in range(2):
            options = {"rank": rank, "region": region, "region_bytes": config.region_bytes}
            options |= {"library": str(config.library) if config.library else None}
            options |= {"parent": os.getpid()}
            self._children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "kernels.probe", "--child", json.dumps(options)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                )
            )
        self._answers: list[queue.Queue[str]] = [queue.Queue(), queue.Queue()]
        for child, answers in zip(self._children, self._answers, strict=True):
            threading.Thread(target=_read, args=(child, answers), daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """Of both processes."""
        return [child.pid for child in self._children]

    def ask(self, step: str, options: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Have both do a step at the same time; their answers.

        Raises:
            Stuck: one does not answer in time, or died.
            Refused: one answers with an error.
        """
        for child, option in zip(self._children, options, strict=True):
            try:
                child.stdin.write(json.dumps({"step": step, **option}) + "\n")
                child.stdin.flush()
            except BrokenPipeError:
                pass  # told below
        answers = []
        for rank, waiting in enumerate(self._answers):
            try:
                line = waiting.get(timeout=self._timeout_s)
            except queue.Empty:
                raise Stuck(
                    f"step {step}: the process of GPU {rank} did not answer in "
                    f"{self._timeout_s:g} s and was killed"
                ) from None
            if not line:
                status = self._children[rank].wait()
                raise Stuck(f"step {step}: the process of GPU {rank} died, status {status}")
            answers.append(json.loads(line))
        for rank, answer in enumerate(answers):
            if error := answer.get("error"):
                raise Refused(f"step {step}: GPU {rank}: {error}")
        return answers

    def kill(self) -> list[int]:
        """End both; those that do not die within 5 s."""
        for child in self._children:
            child.kill()
        left = []
        for child in self._children:
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                left.append(child.pid)
        for child in self._children:
            with contextlib.suppress(BrokenPipeError):  # of a step that it never read
                child.stdin.close()
        return left


def _read(child: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    for line in child.stdout:
        answers.put(line)
    answers.put("")
    child.stdout.close()


def boot_id() -> str:
    """Of this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """NVIDIA's kernel driver, such as 580.126.09; None where there is none to ask."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[0] if found else None


def _bus_ids(config: ProbeConfig) -> list[str]:
    """Asked in a process of its own: this one never touches a GPU."""
    command = [sys.executable, "-m", "kernels.probe", "--child", "devices"]
    command += [str(config.library or "")]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=config.timeout_s, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        raise ProbeImpossible(
            f"probe: CUDA does not start in {config.timeout_s:g} s; the process was killed"
        ) from None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise ProbeImpossible(f"probe: {reason}")
    found = json.loads(lines[-1])
    if max(config.devices) >= len(found):
        raise ProbeImpossible(
            f"probe: devices = {','.join(map(str, config.devices))}; this process sees {len(found)}"
        )
    return [found[device] for device in config.devices]


# ------------------------------------------------------------------------------------ child


class Child:
    """One process of an arm: answers steps with JSON."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.rank, self.region_bytes = options["rank"], options["region_bytes"]
        path = options["library"]
        self.library: Library = abi.load(Path(path) if path else None)
        total = 2 * (self.region_bytes + abi.PAGE_BYTES)
        self.region = SharedRegion.open(options["region"], total)
        self.mine = self.theirs = 0  # what holds each rank's flags and data

    def open(self, options: dict[str, Any]) -> dict[str, Any]:
        """Start CUDA, pin the region, with `peer` allocate what the peer maps."""
        self.library.call("dsv4_set_device", options["device"])
        host = self.library.host_register(self.region.address, self.region.size_bytes)
        self.results = self.region.address + (2 * self.region_bytes) + self.rank * abi.PAGE_BYTES
        self.results_on_device = host + (self.results - self.region.address)
        if options["peer"]:
            self.mine = self.library.device_alloc(self.region_bytes)
            return {"handle": self.library.ipc_export(self.mine)}
        self.mine, self.theirs = (
            host + rank * self.region_bytes for rank in (self.rank, 1 - self.rank)
        )
        return {}

    def map(self, options: dict[str, Any]) -> dict[str, Any]:
        """Map the peer's allocation."""
        self.theirs = self.library.ipc_open(options["handle"])
        return {}

    def clear(self, options: dict[str, Any]) -> dict[str, Any]:
        """Zero this rank's flags: the next launch starts at round 1."""
        zeros = bytes(FLAG_BYTES)
        self.library.call("dsv4_device_write", self.mine, zeros, FLAG_BYTES)
        self.library.call("dsv4_synchronize")
        return {}

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        """Launch and wait; every block's result."""
        num_blocks, sends = options["num_blocks"], options["sends"]
        results = (ProbeResult * num_blocks).from_address(self.results)
        ctypes.memset(self.results, 0, ctypes.sizeof(results))
        # Pushed data lies with the receiver, pulled data with the sender.
        pull = options["arm"] == Arm.PEER_PULL
        args = ProbeArgs(
            write_data=(self.mine if pull else self.theirs) + FLAG_BYTES,
            read_data=(self.theirs if pull else self.mine) + FLAG_BYTES,
            my_flags=self.mine,
            peer_flags=self.theirs,
            results=self.results_on_device,
            deadline_ns=round(options["deadline_s"] * 1e9),
            send_lines=options["lines"] if sends else 0,
            check_lines=0 if sends else options["lines"],
            rounds=options["rounds"],
            untimed_rounds=options["untimed_rounds"],
            num_blocks=num_blocks,
            initiator=sends,
        )
        self.library.call("dsv4_probe", ctypes.byref(args), None)
        self.library.call("dsv4_synchronize")
        return {"blocks": [_plain(block) for block in results]}


def _plain(block: ProbeResult) -> dict[str, Any]:
    values = {name: getattr(block, name) for name, *_ in ProbeResult._fields_}
    return {k: list(v) if isinstance(v, ctypes.Array) else v for k, v in values.items()}


def _child(arguments: list[str]) -> int:
    if arguments[0] == "devices":
        try:
            library = abi.load(Path(arguments[1]) if arguments[1] else None)
            found = [library.bus_id(device) for device in range(library.device_count())]
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        print(json.dumps(found))
        return 0
    options = json.loads(arguments[0])
    _die_with(options["parent"])
    child = None
    for line in sys.stdin:
        step = json.loads(line)
        try:
            child = child or Child(options)
            answer = getattr(child, step.pop("step"))(step)
        except RuntimeError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
    return 0


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent dies, however that happens."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


# ----------------------------------------------------------------------------- command line


def table(result: dict[str, Any]) -> str:
    """The result as one screen of text."""
    key = result["key"]
    lines = [
        f"link {key['bus_ids'][0]} - {key['bus_ids'][1]}, driver {key['driver'] or 'unknown'}",
        f"{'arm':<12} {'verdict':<11} {'direction':<10} {'latency us':>10} {'GB/s':>7}",
    ]
    for arm in result["arms"]:
        head = f"{arm['arm']:<12} {arm['verdict']:<11}"
        for name, figures in arm["directions"].items() or [("-", asdict(Direction()))]:
            latency, bandwidth = figures["latency_us"], figures["bandwidth_gb_s"]
            left = "-" if latency is None else f"{latency:.2f}"
            right = "-" if bandwidth is None else f"{bandwidth:.1f}"
            lines.append(f"{head} {name:<10} {left:>10} {right:>7}")
            head = " " * len(head)
        if arm["reason"]:
            lines.append(f"  {arm['reason']}")
    lines.append(f"peer access: {result['peer_verdict']}")
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, probe, print, return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        return _child(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m kernels.probe", description=(__doc__ or "").split("\n")[0]
    )
    defaults = ProbeConfig()
    parser.add_argument("--devices", default="0,1", help="two CUDA devices; default: 0,1")
    parser.add_argument("--small-rounds", type=int, default=defaults.small_rounds)
    parser.add_argument("--large-rounds", type=int, default=defaults.large_rounds)
    parser.add_argument("--deadline-s", type=float, default=defaults.deadline_s)
    parser.add_argument("--timeout-s", type=float, default=defaults.timeout_s)
    parser.add_argument("--library", type=Path, help="default: the one of `make kernels`")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args(argv)
    try:
        config = ProbeConfig(
            devices=tuple(int(word) for word in arguments.devices.split(",")),
            small_rounds=arguments.small_rounds,
            large_rounds=arguments.large_rounds,
            deadline_s=arguments.deadline_s,
            timeout_s=arguments.timeout_s,
            library=arguments.library,
        )
    except ValueError as error:
        parser.error(str(error))
    try:
        result = probe(config)
    except ProbeImpossible as error:
        print(error, file=sys.stderr)
        return 3
    if arguments.out:
        partial = arguments.out.with_name(f"{arguments.out.name}.partial")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(arguments.out)
    print(table(result))
    return exit_status(result)


if __name__ == "__main__":
    sys.exit(main())
