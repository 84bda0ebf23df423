"""Findings: what each check saw, and where it is a fault, what the owner of the machine can do.

A check never raises for what a machine may look like: what cannot be read is `unknown`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kernels.probe import Arm, Verdict
from serve.allreduce_tier import (
    AUTO,
    FILE_NAME,
    PROBE_TIMEOUT_S,
    Known,
    ProbeVerdict,
    Tier,
    TierError,
    choose,
    parse,
)
from serve.doctor.facts import (
    Card,
    Cards,
    bar1_bytes,
    bridges_between,
    path_between,
    plugged_in,
    read_acs,
    read_cards,
    read_iommu,
)
from serve.doctor.machine import OUT, PYTHON, Machine
from serve.engine import WHEEL_FROM, wheel_problem
from serve.plan import GIB, MIB
from serve.profiles import Device, Profile
from serve.table import Machine as Memory
from serve.table import profile_row

PROBE = (PYTHON, "-m", "kernels.probe", "--out", OUT)
PATCHES_S, VERIFY_S = 60.0, 900.0
ARCHITECTURE, OLDEST_ARCHITECTURE = (12, 0), (8, 0)
OLDEST_DRIVER = (580, 65, 6)  # of CUDA 13.0, which the engine's torch is built with
OLDEST_NCCL = (2, 30, 4)  # 2.28.9 was reported to wedge on long generations, this one to be cured
# vLLM's message queues take 160 MiB for each of three, NCCL's rings and our inboxes the rest.
SHM_BYTES = GIB
MEMLOCK_BYTES = 8 * MIB  # what most hosts allow; containers often have 64 KiB
OPEN_FILES = 1024
CACHE_BYTES = 8 * GIB  # compiled kernels of one engine, with room for the next
CHECKPOINT_BYTES = 160 * GIB  # DeepSeek-V4-Flash in W4A16 with its head is 156 GB
FAR_PATHS = {"SYS": "two sockets", "NODE": "two host bridges of a socket"}


class Level(StrEnum):
    """From good to bad. warning: it serves, but slower or at a risk. fault: it does not serve."""

    OK = "ok"
    UNKNOWN = "unknown"
    WARNING = "warning"
    FAULT = "fault"


class Area(StrEnum):
    """Classes of faults; the exit status says which, see report.py."""

    GPU = "gpu"
    DRIVER = "driver"
    LINK = "link"
    PEER = "peer access"
    HOST = "host"
    ENGINE = "engine"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Finding:
    """value: what was seen. advice: one sentence for the owner; empty where all is well."""

    check: str
    area: Area
    level: Level
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Target:
    """What the machine is to serve. model: the checkpoint's folder."""

    profile: Profile
    model: Path
    host: str
    port: int
    override: str = AUTO  # of the all-reduce
    with_probe: bool = True
    with_verify: bool = True
    keep: Callable[[Known], object] = lambda known: None  # takes what the probe found


Step = Callable[[str], object]  # told what is done next


def ok(check: str, area: Area, value: str) -> Finding:
    return Finding(check, area, Level.OK, value)


def has_gpu(machine: Machine) -> bool:
    """Whether there is any NVIDIA GPU, with or without a driver that answers."""
    return bool(plugged_in(machine) or read_cards(machine).found)


def check_machine(machine: Machine, target: Target, step: Step) -> Iterator[Finding]:
    """All that matters for the profile, in the order of the table."""
    profile = target.profile
    if profile.device is Device.CUDA:
        yield from check_gpus(machine, target, step)
    else:
        yield ok("gpu", Area.GPU, f"not needed: the profile {profile.name} runs on the CPU")
        yield check_memory(machine, target)
    yield check_disk(machine, target)
    yield check_files(machine)
    yield check_port(machine, target)
    step("compare the engine with the patch series")
    yield check_engine(machine, target)
    yield check_checkpoint(machine, target, step)


def check_gpus(machine: Machine, target: Target, step: Step) -> Iterator[Finding]:
    """Cards, driver, link, peer access, and what of the host the ranks share."""
    step("ask nvidia-smi")
    cards, wanted = read_cards(machine), target.profile.tensor_parallel_size
    yield check_cards(machine, cards, wanted)
    used = cards.found[:wanted]
    if used:
        yield from check_used(machine, used, target, step)
    yield from check_shared_host(machine)


def check_used(
    machine: Machine, used: tuple[Card, ...], target: Target, step: Step
) -> Iterator[Finding]:
    """All about the cards that the profile would run on."""
    yield check_architecture(used)
    yield check_card_memory(used, target)
    yield check_driver(used)
    yield check_persistence(used)
    for card in used:
        yield check_link(card)
        yield check_bar1(machine, card)
    yield check_nccl(machine)
    yield check_variables(machine)
    if len(used) == target.profile.tensor_parallel_size == 2:
        yield from check_peers(machine, (used[0], used[1]), target, step)


# ------------------------------------------------------------------------------ the cards


def check_cards(machine: Machine, cards: Cards, wanted: int) -> Finding:
    """Whether there are enough, and the driver answers."""
    on_bus = plugged_in(machine)
    if not cards.found and on_bus:
        return Finding(
            "gpu", Area.DRIVER, Level.FAULT,
            f"{len(on_bus)} on the bus ({', '.join(on_bus)}), none answers: {cards.problem}",
            "Install NVIDIA's driver with its open kernel modules, or in a container start it with "
            "--gpus all, and see `dmesg | grep -i nvrm`.",
        )  # fmt: skip
    names = {card.name for card in cards.found}
    value = f"{len(cards.found)} x {' + '.join(sorted(names))}" if names else "none"
    if len(cards.found) < wanted:
        return Finding(
            "gpu", Area.GPU, Level.FAULT, f"{value}; the profile needs {wanted}",
            "Put in the missing card or make it visible (CUDA_VISIBLE_DEVICES, --gpus all), or "
            "serve the profile cpu-tiny, which needs none.",
        )  # fmt: skip
    limits = {f"{card.power_limit_w:.0f} W" for card in cards.found if card.power_limit_w}
    return ok("gpu", Area.GPU, ", ".join([value, *sorted(limits)]))


def check_architecture(cards: tuple[Card, ...]) -> Finding:
    """What the kernels are compiled for."""
    names = {f"sm_{card.capability.replace('.', '')}" for card in cards}
    value = " and ".join(sorted(names))
    found = [tuple(int(part) for part in card.capability.split(".")) for card in cards]
    if min(found) < OLDEST_ARCHITECTURE or len(names) > 1:
        return Finding(
            "architecture", Area.GPU, Level.FAULT, value,
            "Use two cards of one kind, sm_80 or newer: the kernels are compiled for sm_80, sm_90 "
            "and sm_120.",
        )  # fmt: skip
    if found[0] != ARCHITECTURE:
        return Finding(
            "architecture", Area.GPU, Level.WARNING, f"{value}, not sm_120",
            "Nothing to do: it serves, but profiles and kernels were made for sm_120.",
        )  # fmt: skip
    return ok("architecture", Area.GPU, value)


def check_card_memory(cards: tuple[Card, ...], target: Target) -> Finding:
    """What the profile takes of each card, and whether it is free."""
    if any(card.total_bytes is None or card.free_bytes is None for card in cards):
        return Finding("card memory", Area.GPU, Level.UNKNOWN, "nvidia-smi does not tell")
    total = min(card.total_bytes or 0 for card in cards)
    tightest = min(cards, key=lambda card: card.free_bytes or 0)
    free, share = tightest.free_bytes or 0, target.profile.gpu_memory_utilization
    model = target.model if (target.model / "config.json").exists() else None
    need = profile_row(target.profile, Memory((total,) * len(cards), 0), model).need_bytes
    value = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free, needs {need / GIB:.1f}"
    if need > total:
        return Finding(
            "card memory", Area.GPU, Level.FAULT, value,
            "Choose a profile that fits: `python -m serve profiles` lists what each needs.",
        )  # fmt: skip
    if free < share * total:
        return Finding(
            "card memory", Area.GPU, Level.FAULT,
            f"{value}; vLLM takes {share:.0%} of the card, GPU {tightest.index} has less free",
            "End the other processes on the card, which `nvidia-smi` lists, or lower "
            "--gpu-memory-utilization.",
        )  # fmt: skip
    return ok("card memory", Area.GPU, value)


def numbers(version: str) -> tuple[int, ...]:
    """580.126.09 as numbers, which compare."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def check_driver(cards: tuple[Card, ...]) -> Finding:
    """Whether it is new enough for the engine's CUDA."""
    driver = cards[0].driver
    if numbers(driver) < OLDEST_DRIVER:
        oldest = "580.65.06"
        return Finding(
            "driver", Area.DRIVER, Level.FAULT, f"{driver}; {oldest} or newer is needed",
            f"Install driver {oldest} or newer, with the open kernel modules, and reboot.",
        )  # fmt: skip
    return ok("driver", Area.DRIVER, driver)


def check_persistence(cards: tuple[Card, ...]) -> Finding:
    """Whether the driver stays loaded while nobody uses the cards."""
    off = [card.index for card in cards if card.persistence == "Disabled"]
    if off:
        return Finding(
            "persistence", Area.DRIVER, Level.WARNING, f"off for GPU {', '.join(map(str, off))}",
            "Turn it on with `sudo nvidia-smi -pm 1`, or enable nvidia-persistenced, so that a "
            "restart of the engine does not start the cards anew.",
        )  # fmt: skip
    return ok("persistence", Area.DRIVER, "on")


# ------------------------------------------------------------------------------- the link


def check_link(card: Card) -> Finding:
    """Width and generation that the slot gives, beside what the card can."""
    check = f"link of GPU {card.index}"
    widths, gens = (card.link_width, card.card_width), (card.link_gen, card.card_gen)
    if None in widths + gens:
        return Finding(check, Area.LINK, Level.UNKNOWN, "nvidia-smi does not tell")
    value = f"x{widths[0]} of x{widths[1]}, PCIe {gens[0]}.0 of {gens[1]}.0"
    if widths[0] < widths[1]:
        return Finding(
            check, Area.LINK, Level.WARNING, value,
            "Move the card to a slot with all its lanes from the processor, reseat it and its "
            "riser, and turn off bifurcation of the slot in the BIOS.",
        )  # fmt: skip
    if gens[0] < gens[1]:
        return Finding(
            check, Area.LINK, Level.WARNING, value,
            "Set the slot's generation in the BIOS to the card's, and take a riser out that is "
            "made for an older one; some boards have no more.",
        )  # fmt: skip
    return ok(check, Area.LINK, value)


def check_bar1(machine: Machine, card: Card) -> Finding:
    """Whether all of the card's memory can be reached over the bus."""
    check, size = f"BAR1 of GPU {card.index}", bar1_bytes(machine, card)
    if size is None or card.total_bytes is None:
        return Finding(check, Area.LINK, Level.UNKNOWN, "cannot be read in /sys")
    value = f"{size / GIB:.4g} GiB"
    if size < card.total_bytes:
        return Finding(
            check, Area.LINK, Level.WARNING,
            f"{value}, less than the card's {card.total_bytes / GIB:.1f}",
            "Turn on Above 4G Decoding and Resizable BAR in the BIOS; without it the cards cannot "
            "reach each other's memory.",
        )  # fmt: skip
    return ok(check, Area.LINK, value)


# ----------------------------------------------------------------------------- peer access


def check_peers(
    machine: Machine, pair: tuple[Card, Card], target: Target, step: Step
) -> Iterator[Finding]:
    """Path, IOMMU, ACS: what may break peer access. The probe: whether it is broken."""
    known, probed = check_probe(machine, target, step)
    yield check_path(machine, pair)
    for finding in (check_iommu(machine, pair), check_acs(machine, pair)):
        if finding.level is Level.WARNING and probed.level is Level.OK:
            yield ok(finding.check, finding.area, f"{finding.value}; the probe finds no harm in it")
        else:
            yield finding
    yield probed
    yield check_tier(machine, known, target)


def check_path(machine: Machine, pair: tuple[Card, Card]) -> Finding:
    """What lies between the cards."""
    path = path_between(machine, pair)
    if path is None:
        return Finding("topology", Area.LINK, Level.UNKNOWN, "nvidia-smi topo -m does not tell")
    if path == "SYS":
        return Finding(
            "topology", Area.LINK, Level.WARNING, f"{path}: {FAR_PATHS[path]} between the cards",
            "Move both cards to slots of one processor: every sum crosses what lies between them.",
        )  # fmt: skip
    more = f": {FAR_PATHS[path]}" if path in FAR_PATHS else ""
    return ok("topology", Area.LINK, f"{path}{more}")


def check_iommu(machine: Machine, pair: tuple[Card, Card]) -> Finding:
    """Whether what a card writes to the other is translated on its way."""
    iommu = read_iommu(machine, pair)
    options = " ".join(iommu.options) or "no option on the kernel's command line"
    if iommu.translates is None:
        return Finding(
            "IOMMU", Area.PEER, Level.UNKNOWN,
            f"{', '.join(iommu.units)}; the cards' groups cannot be read; {options}",
            "Run the doctor on the host rather than in a container; the probe decides anyway.",
        )  # fmt: skip
    if iommu.translates:
        kinds = ", ".join(sorted({domain for domain in iommu.domains if domain}))
        return Finding(
            "IOMMU", Area.PEER, Level.WARNING, f"translates for the cards ({kinds}); {options}",
            "Turn the IOMMU off in the BIOS or add iommu=pt to the kernel's command line, reboot, "
            "and run the doctor again.",
        )  # fmt: skip
    return ok("IOMMU", Area.PEER, f"{'passes through' if iommu.units else 'off'}; {options}")


def check_acs(machine: Machine, pair: tuple[Card, Card]) -> Finding:
    """Whether bridges between the cards send peer writes to the processor first."""
    bridges = bridges_between(machine, pair)
    ports = read_acs(machine, bridges)
    if ports.redirecting:
        shown = ", ".join(f"{port} ({word:#06x})" for port, word in ports.redirecting.items())
        commands = "; ".join(f"sudo setpci -s {p} ECAP_ACS+6.w=0000" for p in ports.redirecting)
        return Finding(
            "ACS", Area.PEER, Level.WARNING, f"redirects at {shown}",
            f"Turn ACS off in the BIOS, or at each boot with `{commands}`, which gives up the "
            "isolation of the cards from each other, and run the doctor again.",
        )  # fmt: skip
    if ports.unread:
        return Finding(
            "ACS", Area.PEER, Level.UNKNOWN, f"{', '.join(ports.unread)}: needs root to be read",
            "Run it once as root on the host: `sudo .venv/bin/python -m serve doctor`.",
        )  # fmt: skip
    if not bridges:
        return Finding("ACS", Area.PEER, Level.UNKNOWN, "no bridge is seen between the cards")
    return ok("ACS", Area.PEER, f"redirects at none of {ports.num_read} bridges")


def check_probe(machine: Machine, target: Target, step: Step) -> tuple[Known | None, Finding]:
    """Run the probe. Also what is known of the link then; None: nothing."""
    if not target.with_probe:
        return None, Finding("probe", Area.PEER, Level.UNKNOWN, "left out, as asked for")
    step(f"probe the link between the cards, at most {PROBE_TIMEOUT_S:g} s")
    done = machine.run(PROBE, PROBE_TIMEOUT_S)
    if done.status is None:
        return None, Finding(
            "probe", Area.PEER, Level.FAULT, f"did not end in {PROBE_TIMEOUT_S:g} s and was killed",
            "Reboot, since a card may be stuck in a kernel, and see `dmesg | grep -i xid`; until "
            "the probe ends nothing is proven.",
        )  # fmt: skip
    try:
        result = json.loads(done.file or "")
        verdict = ProbeVerdict.from_result(result)
    except ValueError:
        return None, Finding(
            "probe", Area.PEER, Level.WARNING, f"could not run: {done.last_line}",
            "Put that right: without the probe the slowest all-reduce is used, since nothing else "
            "is proven.",
        )  # fmt: skip
    known = Known(verdict.key, result)
    target.keep(known)
    return known, probe_finding(verdict)


def probe_finding(verdict: ProbeVerdict) -> Finding:
    """The verdict, arm by arm, and what it means."""
    arms = {arm: found for arm, (found, _) in verdict.arms.items()}
    value = ", ".join(f"{arm.value} {found.value}" for arm, found in arms.items())
    reasons = [reason for _, reason in verdict.arms.values() if reason]
    value += f" ({reasons[0]})" if reasons else ""
    if arms[Arm.HOST_PINNED] not in (Verdict.HEALTHY, Verdict.SLOW):
        return Finding(
            "probe", Area.PEER, Level.FAULT, value,
            "Reboot and run it again; if memory of the host still fails, suspect driver, memory or "
            "board, for no all-reduce of two cards does without it.",
        )  # fmt: skip
    peers = (arms[Arm.PEER_PUSH], arms[Arm.PEER_PULL])
    advice = {
        Verdict.SLOW: "Look at the link, IOMMU and ACS above: peer writes take a way round.",
        Verdict.WRONG_DATA: "Peer access alters data and stays unused; to have it, put IOMMU and "
        "ACS above in order, reboot, and run the doctor again.",
        Verdict.HANG: "Peer writes get lost, so peer access stays unused; to have it, put IOMMU "
        "and ACS above in order, reboot, and run the doctor again.",
        Verdict.IMPOSSIBLE: "CUDA refuses peer access, so it stays unused; look at BAR1 and IOMMU "
        "above, and in a container share the host's IPC and PID namespaces.",
    }
    worst = max(peers, key=list(Verdict).index)
    if worst is Verdict.HEALTHY:
        return ok("probe", Area.PEER, value)
    return Finding("probe", Area.PEER, Level.WARNING, value, advice[worst])


def check_tier(machine: Machine, known: Known | None, target: Target) -> Finding:
    """Which all-reduce the server would use, and why none before it."""
    path = Path(machine.fact("cache_folder")) / FILE_NAME
    demoted: list[Tier] = []
    kept = machine.text(str(path))
    if kept and known:
        try:
            demoted = [d.tier for d in (parse(kept, known.key) or known).demotions]
        except ValueError:
            demoted = []  # `serve run` discards it, and says so
    try:
        choice = choose(known.verdict if known else None, target.override, demoted)
    except (TierError, ValueError) as error:
        return Finding(
            "all-reduce", Area.PEER, Level.FAULT, str(error),
            f"Put right what the probe says, or leave --allreduce at {AUTO}.",
        )  # fmt: skip
    value = f"{choice.tier.value}: {choice.reason}"
    if demoted:
        return Finding(
            "all-reduce", Area.PEER, Level.WARNING, value,
            f"Delete {path} to have demoted tiers tried again, once the cause is found.",
        )  # fmt: skip
    return ok("all-reduce", Area.PEER, value)


def check_nccl(machine: Machine) -> Finding:
    """Whether NCCL is one that is not reported to wedge."""
    version, oldest = machine.fact("nccl"), ".".join(map(str, OLDEST_NCCL))
    if version is None:
        return Finding(
            "NCCL", Area.ENGINE, Level.UNKNOWN, "nvidia-nccl-cu13 is not installed here",
            "Run the doctor with the Python that serves: the CUDA engine's.",
        )  # fmt: skip
    if numbers(version) < OLDEST_NCCL:
        return Finding(
            "NCCL", Area.ENGINE, Level.WARNING, f"{version}; older than {oldest}",
            f"Install nvidia-nccl-cu13 {oldest} or newer over it: older ones are reported to "
            "wedge.",
        )  # fmt: skip
    return ok("NCCL", Area.ENGINE, version)


def check_variables(machine: Machine) -> Finding:
    """Variables that work against the choice of a tier."""
    given = machine.fact("environment")
    value = " ".join(f"{name}={text}" for name, text in sorted(given.items())) or "none set"
    if given.get("NCCL_PROTO"):
        return Finding(
            "variables", Area.ENGINE, Level.WARNING, value,
            "Unset NCCL_PROTO: one protocol for all sizes costs bandwidth where prompts are long.",
        )  # fmt: skip
    if given.get("NCCL_SHM_DISABLE", "0") != "0":
        return Finding(
            "variables", Area.ENGINE, Level.WARNING, value,
            "Unset NCCL_SHM_DISABLE: without peer access NCCL would go over the network.",
        )  # fmt: skip
    return ok("variables", Area.ENGINE, value)


# -------------------------------------------------------------------------------- the host


def check_shared_host(machine: Machine) -> Iterator[Finding]:
    """What the ranks' processes share: /dev/shm, pinned memory."""
    space = machine.space("/dev/shm")
    if space is None:
        yield Finding("/dev/shm", Area.HOST, Level.UNKNOWN, "cannot be read")
    else:
        value = f"{space[1] / MIB:,.0f} of {space[0] / MIB:,.0f} MiB free"
        if space[1] < SHM_BYTES:
            yield Finding(
                "/dev/shm", Area.HOST, Level.FAULT, f"{value}; {SHM_BYTES // MIB:,} are needed",
                "Start the container with --shm-size 16g, as docker-compose.yml does, or on a host "
                "delete what fills it or `mount -o remount,size=16g /dev/shm`.",
            )  # fmt: skip
        else:
            yield ok("/dev/shm", Area.HOST, value)
    limit = machine.fact("memlock_bytes")
    if limit is None:
        yield Finding("memlock", Area.HOST, Level.UNKNOWN, "cannot be read")
    elif 0 <= limit < MEMLOCK_BYTES:
        yield Finding(
            "memlock", Area.HOST, Level.WARNING, f"{limit / MIB:.4g} MiB",
            "Raise it with `ulimit -l unlimited`, or in a container with --ulimit memlock=-1: "
            "pinned memory is what the cards meet in.",
        )  # fmt: skip
    else:
        yield ok("memlock", Area.HOST, "no limit" if limit < 0 else f"{limit / MIB:,.0f} MiB")


def check_memory(machine: Machine, target: Target) -> Finding:
    """Main memory, for a CPU profile."""
    lines = (machine.text("/proc/meminfo") or "").splitlines()
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    if "MemAvailable" not in known:
        return Finding("memory", Area.HOST, Level.UNKNOWN, "cannot be read")
    available = int(known["MemAvailable"].split()[0]) * 1024
    row = profile_row(target.profile, Memory((), available), target.model)
    value = f"{available / GIB:.1f} GiB available, needs {row.need_bytes / GIB:.1f}"
    if not row.fits:
        return Finding(
            "memory", Area.HOST, Level.FAULT, value,
            "End other programs, or lower --cpu-kv-cache-gib.",
        )  # fmt: skip
    return ok("memory", Area.HOST, value)


def check_disk(machine: Machine, target: Target) -> Finding:
    """Room for what is compiled, and for a checkpoint that is not there yet."""
    folder = machine.fact("cache_folder")
    space = machine.space(folder)
    if space is None:
        return Finding("disk", Area.HOST, Level.UNKNOWN, f"{folder} cannot be read")
    value = f"{space[1] / GIB:,.1f} GiB free for {folder}"
    gpu = target.profile.device is Device.CUDA
    need = CACHE_BYTES if gpu else GIB
    if space[1] < need:
        return Finding(
            "disk", Area.HOST, Level.WARNING, f"{value}; {need // GIB} are wanted",
            "Make room there, or set XDG_CACHE_HOME to a folder on another disk: compiled kernels "
            "are kept there.",
        )  # fmt: skip
    if gpu and machine.real(str(target.model)) is None:
        space = machine.space(str(target.model))
        if space and space[1] < CHECKPOINT_BYTES:
            return Finding(
                "disk", Area.HOST, Level.FAULT,
                f"{space[1] / GIB:,.1f} GiB free for {target.model}, which is not there yet",
                f"Make room for {CHECKPOINT_BYTES // GIB} GiB, or name a folder on another disk "
                "with --model.",
            )  # fmt: skip
    return ok("disk", Area.HOST, value)


def check_files(machine: Machine) -> Finding:
    """How many files and connections a process may have open."""
    limit = machine.fact("open_files")
    if limit is not None and 0 <= limit < OPEN_FILES:
        return Finding(
            "open files", Area.HOST, Level.WARNING, f"{limit}",
            f"Raise it with `ulimit -n {64 * OPEN_FILES}`: each client is one.",
        )  # fmt: skip
    return ok("open files", Area.HOST, "unknown limit" if limit is None else f"{limit:,}")


def check_port(machine: Machine, target: Target) -> Finding:
    """Whether the server could listen."""
    value = f"{target.host}:{target.port}"
    if problem := machine.port_problem(target.host, target.port):
        return Finding(
            "port", Area.HOST, Level.FAULT, f"{value}: {problem}",
            f"End what listens there, which `ss -ltnp 'sport = :{target.port}'` shows, or take "
            "another with --port; a server that runs already is no fault.",
        )  # fmt: skip
    return ok("port", Area.HOST, f"{value} is free")


# ------------------------------------------------------------------- engine and checkpoint


def check_engine(machine: Machine, target: Target) -> Finding:
    """Whether the installed vLLM is the pinned one with exactly the patch series."""
    site = machine.fact("site_packages")
    advice = "Run `make setup`, or use the image: this project's patches are not in that engine."
    if site is None:
        return Finding("engine", Area.ENGINE, Level.FAULT, "vLLM is not installed", advice)
    if problem := wheel_problem(machine.fact("wheel"), target.profile.device):
        way_out = f"Serve with another: {WHEEL_FROM[target.profile.device]}."
        return Finding("engine", Area.ENGINE, Level.FAULT, problem, way_out)
    command = (PYTHON, "patches/patchq.py", "verify", "--root", site)
    done = machine.run(command, PATCHES_S)
    if done.status:
        return Finding("engine", Area.ENGINE, Level.FAULT, done.last_line, advice)
    if done.status is None:
        return Finding("engine", Area.ENGINE, Level.UNKNOWN, f"no answer in {PATCHES_S:g} s")
    return ok("engine", Area.ENGINE, done.last_line)


def check_checkpoint(machine: Machine, target: Target, step: Step) -> Finding:
    """What `serve run` checks; for a quantized one with its head, what `retrofit verify` does."""
    model, speculates = str(target.model), target.profile.num_speculative_tokens
    config = machine.text(f"{model}/config.json")
    if config is None:
        return Finding(
            "checkpoint", Area.CHECKPOINT, Level.FAULT, f"{model}: no config.json",
            "Name its folder with --model, or make it with `python -m retrofit`, see "
            "docs/retrofit.md.",
        )  # fmt: skip
    if problem := machine.checkpoint_problem(model, speculates):
        return Finding(
            "checkpoint", Area.CHECKPOINT, Level.FAULT, problem,
            "Fetch or make the files again that it names.",
        )  # fmt: skip
    if not target.with_verify:
        return ok("checkpoint", Area.CHECKPOINT, f"{model}: complete; values not looked at")
    if "compressed-tensors" not in config or not speculates:
        return ok("checkpoint", Area.CHECKPOINT, f"{model}: complete")
    step(f"verify {model}, at most {VERIFY_S:g} s")
    done = machine.run((PYTHON, "-m", "retrofit", "verify", model), VERIFY_S)
    if done.status is None:
        return Finding(
            "checkpoint", Area.CHECKPOINT, Level.UNKNOWN, f"{model}: no answer in {VERIFY_S:g} s",
            f"Run `python -m retrofit verify {model}` by itself: the disk may be slow.",
        )  # fmt: skip
    if done.status:
        faults = [line for line in done.out.splitlines() if line.startswith("fault: ")]
        value = faults[0].removeprefix("fault: ") if faults else done.last_line
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        return Finding(
            "checkpoint", Area.CHECKPOINT, Level.FAULT, f"{value}{more}",
            f"See all with `python -m retrofit verify {model}`, then fetch or make those files "
            "again.",
        )  # fmt: skip
    return ok("checkpoint", Area.CHECKPOINT, f"{model}: sound")
