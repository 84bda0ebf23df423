"""Which all-reduce the engine uses: the first tier, from fast to safe, that the probe has proven.

    verdict of `kernels.probe` -> choose -> environment of the engine
    a fault of its engine      -> demote -> choose again, one tier down

A tier that was asked for by name is used or refused, never changed.

Verdict and demotions are kept in one file and hold for this boot, driver and pair of cards only.
Nothing is ever tried out on requests: a tier without a proof is not used, whoever asks for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from kernels.probe import Arm, Verdict, boot_id, driver_version
from serve.engine import REPOSITORY
from serve.errors import ServeError

SCHEMA_VERSION = 1
AUTO = "auto"
FILE_NAME = "allreduce.json"  # in this user's cache
TIER_VARIABLE = "DSV4_ALLREDUCE_TIER"  # read by kernels/bounded_worker.py
NCCL_P2P_OFF = "NCCL_P2P_DISABLE"
PROBE_TIMEOUT_S = 300.0
DEVICES_S = 60.0
END_S = 5.0  # from the kill of a process that asked CUDA to giving up on it


class Tier(StrEnum):
    """From the fastest to the one that needs least of the machine."""

    PEER_PUSH = "peer-push"  # ours, through the peer's memory
    VLLM_CUSTOM = "vllm-custom"
    NCCL_P2P = "nccl-p2p"
    HOST_PINNED = "host-pinned"  # ours, through /dev/shm
    NCCL_SHM = "nccl-shm"


KERNEL_TIERS = (Tier.PEER_PUSH, Tier.HOST_PINNED)  # ours; they need our worker
# What vLLM would put before its tiers, unproven: each goes over peer memory.
OTHERS_OFF = {
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
# vLLM's compilation config: on Hopper it would put FlashInfer's all-reduce and RMSNorm in one, over
# peer memory and past every tier.
FUSION_OFF = {"pass_config": {"fuse_allreduce_rms": False}}
PEER_TIERS = (Tier.PEER_PUSH, Tier.VLLM_CUSTOM, Tier.NCCL_P2P)
# What each does over the link, so which arms of the probe must be healthy. vLLM's reads the peer's
# buffer and writes its flags; NCCL does either, by its own choice.
NEEDS = {
    Tier.PEER_PUSH: (Arm.PEER_PUSH,),
    Tier.VLLM_CUSTOM: (Arm.PEER_PUSH, Arm.PEER_PULL),
    Tier.NCCL_P2P: (Arm.PEER_PUSH, Arm.PEER_PULL),
    Tier.HOST_PINNED: (Arm.HOST_PINNED,),
}
BROKEN = (Verdict.WRONG_DATA, Verdict.HANG)


class TierError(ServeError):
    """No all-reduce is proven, or not the one that was asked for."""

    exit_code: ClassVar[int] = 5


@dataclass(frozen=True)
class Key:
    """What a verdict holds for. bus_ids: of the engine's cards, in its order."""

    boot_id: str
    driver: str | None
    bus_ids: tuple[str, ...]


@dataclass(frozen=True)
class ProbeVerdict:
    """What the probe said: by arm, its verdict and the reason. key: of which boot and cards."""

    key: Key
    arms: Mapping[Arm, tuple[Verdict, str]]

    @classmethod
    def from_result(cls, result: Any) -> ProbeVerdict:
        """Take it from what `python -m kernels.probe --out` writes.

        Raises:
            ValueError: it is something else.
        """
        try:
            key = result["key"]
            arms = {Arm(a["arm"]): (Verdict(a["verdict"]), a["reason"]) for a in result["arms"]}
            made = Key(key["boot_id"], key["driver"], tuple(key["bus_ids"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a result of the probe: {error!r}") from None
        if arms.keys() != set(Arm):
            raise ValueError(f"not a result of the probe: arms {sorted(arms)}")
        return cls(made, arms)


@dataclass(frozen=True)
class Demotion:
    """A tier that had a fault in a start or later, or that goes over the link of one that did."""

    tier: Tier
    reason: str
    at: str


@dataclass(frozen=True)
class Choice:
    """environment: what the engine is started with for this tier."""

    tier: Tier
    reason: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Failure:
    """An all-reduce ended the engine. said: what failed and what became of the tier.

    choice: of the engine's next life; None: as it was, which ends must be counted.
    """

    said: str
    choice: Choice | None = None


# ---------------------------------------------------------------------------------- choosing


def objection(verdict: ProbeVerdict | None, tier: Tier) -> Arm | None:
    """The arm of the probe that keeps a tier from being proven; None when it is proven.

    NCCL over shared memory needs nothing of the link: it counts as proven unless the probe saw that
    memory of the host, too, loses or alters data.
    """
    if verdict is None:
        return None if tier is Tier.NCCL_SHM else NEEDS[tier][0]
    if tier is Tier.NCCL_SHM:
        return Arm.HOST_PINNED if verdict.arms[Arm.HOST_PINNED][0] in BROKEN else None
    # Through host memory there is nothing faster to fall to: right but slow will do.
    enough = (Verdict.HEALTHY,) if tier in PEER_TIERS else (Verdict.HEALTHY, Verdict.SLOW)
    return next((arm for arm in NEEDS[tier] if verdict.arms[arm][0] not in enough), None)


def choose(
    verdict: ProbeVerdict | None, override: str = AUTO, demoted: Sequence[Tier] = ()
) -> Choice:
    """The tier that is asked for; with `auto` the first that is proven and not demoted.

    Args:
        verdict: of this boot, driver and cards; None: not probed.
        override: `auto`, or the name of a tier.
        demoted: tiers that had a fault.

    Raises:
        ValueError: override is no tier.
        TierError: the tier asked for is not proven, or is demoted; no tier is left.
    """
    if override != AUTO:
        asked = Tier(override)
        if arm := objection(verdict, asked):
            wrong = f"not proven: {said_of(verdict, arm)}"
        elif asked in demoted:
            wrong = "demoted: it had a fault since this boot"
        else:
            return Choice(asked, "asked for", environment(asked, verdict, demoted))
        raise TierError(
            f"all-reduce: {asked.value} is asked for and {wrong}. "
            f"Ask for {AUTO}, or see `python -m serve doctor`"
        )
    passed: dict[str, list[str]] = {}  # why, and which tiers
    for tier in Tier:
        if tier in demoted:
            why = "had a fault since this boot"
        elif arm := objection(verdict, tier):
            why = f"{arm.value} {verdict.arms[arm][0].value}" if verdict else "not probed"
        else:
            reason = "; ".join(f"not {', '.join(names)}: {why}" for why, names in passed.items())
            reason = reason or "proven by the probe"
            return Choice(tier, reason, environment(tier, verdict, demoted))
        passed.setdefault(why, []).append(tier.value)
    said = said_of(verdict, Arm.HOST_PINNED)
    raise TierError(f"all-reduce: no tier is proven, or all had faults; the probe said: {said}")


def said_of(verdict: ProbeVerdict | None, arm: Arm) -> str:
    """What the probe said of an arm, with its reason."""
    if verdict is None:
        return "the link was not probed"
    found, reason = verdict.arms[arm]
    return f"{arm.value} {found.value}" + (f" ({reason})" if reason else "")


def environment(
    tier: Tier, verdict: ProbeVerdict | None, demoted: Sequence[Tier] = ()
) -> dict[str, str]:
    """Variables of the engine. NCCL takes what a tier does not: large messages, other dtypes.

    NCCL's peer access is on only where it is proven. Where a tier over peers failed it is off,
    unless NCCL over peers is the tier. Its protocol stays its own choice: LL for all sizes costs
    bandwidth where messages are large.
    """
    over_peers = tier is Tier.NCCL_P2P or (
        tier is not Tier.NCCL_SHM
        and not objection(verdict, Tier.NCCL_P2P)
        and not any(other in demoted for other in PEER_TIERS)
    )
    found = {TIER_VARIABLE: tier.value, NCCL_P2P_OFF: "0" if over_peers else "1"}
    found |= OTHERS_OFF
    return found | ({"NCCL_P2P_LEVEL": "SYS"} if over_peers else {})


# ----------------------------------------------------------------------------------- keeping


@dataclass
class Known:
    """What is known of a link, as it is kept. result: of the probe; None: not probed."""

    key: Key
    result: dict[str, Any] | None = None
    demotions: list[Demotion] = field(default_factory=list)

    @property
    def verdict(self) -> ProbeVerdict | None:
        return ProbeVerdict.from_result(self.result) if self.result else None

    @property
    def demoted(self) -> list[Tier]:
        return [demotion.tier for demotion in self.demotions]


def parse(text: str, key: Key) -> Known | None:
    """What a file says; None if it is of another key.

    Raises:
        ValueError: it is no such file.
    """
    try:
        data = json.loads(text)
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version = {data['schema_version']}; must be {SCHEMA_VERSION}")
        kept = Key(**{**data["key"], "bus_ids": tuple(data["key"]["bus_ids"])})
        demotions = [Demotion(**{**d, "tier": Tier(d["tier"])}) for d in data["demotions"]]
        known = Known(kept, data["result"], demotions)
        if known.verdict is not None and known.verdict.key != kept:
            raise ValueError("the probe's key is not the file's")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{error!r}") from None
    return known if kept == key else None


def load(path: Path, key: Key, say: Callable[[str], object]) -> Known:
    """What is kept for this key. A file for another key, or that does not parse, is as none."""
    why = "it is of another boot, driver or pair of cards"
    try:
        if known := parse(path.read_text(encoding="utf-8"), key):
            return known
    except FileNotFoundError:
        return Known(key)
    except (OSError, ValueError) as error:
        why = str(error)
    say(f"all-reduce: {path} is discarded: {why}")
    return Known(key)


def save(path: Path, known: Known) -> None:
    """Write it under a temporary name, then rename.

    Raises:
        OSError: it cannot be written.
    """
    data = {"schema_version": SCHEMA_VERSION, **asdict(known)}
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def demote(known: Known, tier: Tier, reason: str) -> None:
    """Add a tier that had a fault, once."""
    if tier not in known.demoted:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        known.demotions.append(Demotion(tier, reason, at))


# ------------------------------------------------------------------------------------ asking

# In a process of its own: this one never touches a GPU.
ASK_DEVICES = (
    "import json; from kernels import allreduce_abi as abi; library = abi.load(); "
    "print(json.dumps([library.bus_id(d) for d in range(library.device_count())]))"
)


def this_key() -> Key:
    """The key of the two cards that the engine will see as 0 and 1.

    Raises:
        TierError: no library, no CUDA, fewer than two devices.
    """
    command = [sys.executable, "-c", ASK_DEVICES]
    done = ask(command, DEVICES_S)
    if done is None:
        raise TierError(f"all-reduce: CUDA does not start in {DEVICES_S:g} s")
    if done.returncode:
        raise TierError(f"all-reduce: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if len(found) < 2:
        raise TierError(f"all-reduce: this process sees {len(found)} CUDA devices; 2 are needed")
    return Key(boot_id(), driver_version(), tuple(found[:2]))


def run_probe(key: Key, timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, Any]:
    """Run `kernels.probe`; its result, which is of `key`.

    Raises:
        TierError: it could not run, or did not end; then it is killed, and so are its processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "probe.json"
        command = [sys.executable, "-m", "kernels.probe", "--out", str(out)]
        done = ask(command, timeout_s)
        if done is None:
            raise TierError(f"all-reduce: the probe did not end in {timeout_s:g} s")
        if not out.exists():
            said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise TierError(f"all-reduce: {said}")
        result = json.loads(out.read_text(encoding="utf-8"))
        try:
            found = ProbeVerdict.from_result(result).key
        except ValueError as error:
            raise TierError(f"all-reduce: {error}") from None
        if found != key:
            raise TierError(f"all-reduce: the probe looked at {found}, the engine will at {key}")
        return result


def ask(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str] | None:
    """What a command that asks CUDA says; None if it does not end in time.

    One that waits in the driver may not even die: it is killed, and after END_S left behind.
    """
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=END_S)
        return None
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


# ----------------------------------------------------------------------------------- serving


class AllReduce:
    """The tier in use, for the one who starts the engine and starts it again.

    Args:
        path: where what is known is kept.
        known: what is known, as `load` gave it, probed.
        override: as of `choose`.

    Raises:
        TierError: as `choose`.
    """

    def __init__(
        self, path: Path, known: Known, override: str, say: Callable[[str], object]
    ) -> None:
        # Demotions since this process started, by (from, to).
        self.counts: Counter[tuple[Tier, Tier]] = Counter()
        self._path, self._known, self._override, self._say = path, known, override, say
        self.choice = choose(known.verdict, override, known.demoted)

    @classmethod
    def of_this_machine(
        cls, path: Path, override: str, say: Callable[[str], object], probe: bool = True
    ) -> AllReduce:
        """Take what is kept for these cards, else, with `probe`, probe them and keep that.

        Raises:
            TierError: as `choose`, `this_key`.
        """
        known = Known(Key("", None, ()))
        try:
            known = load(path, this_key(), say)
            if known.result is None and not probe:
                raise TierError("all-reduce: the link is not probed here")
            if known.result is None:
                say(f"all-reduce: the link between {' and '.join(known.key.bus_ids)} is probed")
                known.result = run_probe(known.key)
                keep(path, known, say)
        except TierError as error:
            only = f"without a proof only {Tier.NCCL_SHM.value} is used"
            say(f"{error}; {only}; see `python -m serve doctor`")
        return cls(path, known, override, say)

    @property
    def demotions(self) -> Sequence[Demotion]:
        """Tiers that had faults since this boot."""
        return tuple(self._known.demotions)

    def after_end(
        self, lines: Iterable[str], stall: str = "", starting: bool = False
    ) -> Failure | None:
        """Demote the tier if the engine ended by its fault and another may take its place.

        Args:
            lines: the engine's last output, where a worker says that an all-reduce failed.
            stall: why it was ended, if it made no progress where ranks wait for each other.
            starting: it stalled before it was ready.

        Returns:
            The failure, and what the next life is to be started with; None: it was none of ours.
        """
        failed: Tier | None = self.choice.tier
        fault = next((found for line in lines if (found := fault_of(line))), None)
        if fault is None and stall:
            fault, failed = stall, self._blamed(starting)
        if fault is None or failed is None:
            return None
        if self._override != AUTO:
            return Failure(f"{self.choice.tier.value} was asked for and is not demoted: {fault}")
        # Of the other tiers over peers none checks its sums: they would go on with wrong data.
        link_lies = failed in PEER_TIERS and DIFFERENT_SUMS in fault
        others = [tier for tier in PEER_TIERS if link_lies and tier is not failed]
        try:
            choice = choose(self._known.verdict, AUTO, [*self._known.demoted, failed, *others])
        except TierError:
            return Failure(f"{failed.value} is the last tier and is not demoted: {fault}")
        demote(self._known, failed, fault)
        for tier in others:
            demote(self._known, tier, f"over the same link as {failed.value}: {fault}")
        # Where NCCL's large messages stalled, our kernel stays, and NCCL goes through host memory.
        taken = choice.tier if failed is self.choice.tier else Tier.NCCL_SHM
        self.counts[failed, taken] += 1
        keep(self._path, self._known, self._say)
        self.choice = choice
        self._say(
            f"all-reduce: {failed.value} is demoted to {taken.value} until the next "
            f"boot; delete {self._path} to probe and try it again: {fault}"
        )
        return Failure(f"{failed.value} is demoted to {taken.value}: {fault}", choice)

    def _blamed(self, starting: bool) -> Tier | None:
        """The tier whose fault a stall is taken for.

        vLLM's own all-reduce and NCCL over peer access wait for ever and say nothing. The waits of
        our kernels have a deadline and say so: what stalls beside them is NCCL, which takes their
        large messages. In a start that deadline is long, because a rank may compile: there it may
        be the kernels, too.
        """
        tier = self.choice.tier
        if tier in KERNEL_TIERS and self.choice.environment[NCCL_P2P_OFF] == "0":
            return Tier.NCCL_P2P
        if tier in (Tier.VLLM_CUSTOM, Tier.NCCL_P2P) or (starting and tier in KERNEL_TIERS):
            return tier
        return None


@dataclass(frozen=True)
class Tiers:
    """all_reduce: says which tier. start: the engine's command and environment with it."""

    all_reduce: AllReduce
    start: Callable[[Choice], tuple[list[str], dict[str, str]]]


def keep(path: Path, known: Known, say: Callable[[str], object]) -> None:
    """Save; that it cannot be saved is said and stops nothing."""
    try:
        save(path, known)
    except OSError as error:
        say(f"all-reduce: {path} cannot be written: {error.strerror}")


FAULT = "all_reduce_oneshot: "  # as kernels/allreduce.py begins its messages
DIFFERENT_SUMS = " different sums "


def fault_of(line: str) -> str | None:
    """What a line of the engine's output says of a failed all-reduce, None if nothing."""
    _, found, said = line.partition(FAULT)
    gave_up = said.startswith("rank ") and " waited " in said
    differs = said.startswith("ranks ") and DIFFERENT_SUMS in said
    return (found + said).strip() if gave_up or differs or said.startswith("setup, ") else None
