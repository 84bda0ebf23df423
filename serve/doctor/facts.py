"""What was read of the cards and of the bridges between them, as values."""

from __future__ import annotations

import re
from dataclasses import dataclass

from serve.doctor.machine import Machine

MIB = 2**20
SMI_S = 30.0
DEVICES = "/sys/bus/pci/devices"
ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
NVIDIA, DISPLAY = "0x10de", "0x03"

FIELDS = ("index", "name", "pci.bus_id", "compute_cap", "memory.total", "memory.free")
FIELDS += ("driver_version", "pcie.link.gen.max", "pcie.link.gen.gpumax")
FIELDS += ("pcie.link.width.current", "pcie.link.width.max", "persistence_mode", "power.limit")
QUERY = ("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
TOPOLOGY = ("nvidia-smi", "topo", "-m")

# PCI Express Base Specification, 7.7.8 (ACS) and 7.6.3 (extended capabilities).
EXTENDED = 0x100
ACS = 0x000D
ACS_CONTROL = 6
REQUEST_REDIRECT, COMPLETION_REDIRECT = 1 << 2, 1 << 3
WITHOUT_ROOT = 64  # bytes of configuration space that the kernel shows to everybody


@dataclass(frozen=True)
class Card:
    """One GPU, as nvidia-smi tells; None where it does not.

    link_gen, card_gen: the fastest that card and slot can do together, and the card alone. What
    the link does now says nothing: cards slow it down while they are idle.
    """

    index: int
    name: str
    address: str  # as in /sys: 0000:01:00.0
    capability: str
    total_bytes: int | None
    free_bytes: int | None
    driver: str
    link_gen: int | None
    card_gen: int | None
    link_width: int | None
    card_width: int | None
    persistence: str
    power_limit_w: float | None


@dataclass(frozen=True)
class Cards:
    """found: those that answer. problem: why nvidia-smi tells nothing."""

    found: tuple[Card, ...]
    problem: str = ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], [Unknown Error]
        return None


def _count(text: str) -> int | None:
    value = _number(text)
    return None if value is None else int(value)


def _bytes(text: str) -> int | None:
    value = _count(text)
    return None if value is None else value * MIB


def read_cards(machine: Machine) -> Cards:
    """Ask nvidia-smi."""
    asked = machine.run(QUERY, SMI_S)
    if asked.status is None:
        return Cards((), f"nvidia-smi does not answer in {SMI_S:g} s")
    if asked.status:
        return Cards((), asked.last_line)
    cards = []
    for line in asked.out.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(FIELDS):
            return Cards((), f"nvidia-smi said {line!r}")
        row = dict(zip(FIELDS, values, strict=True))
        cards.append(
            Card(
                index=int(row["index"]),
                name=row["name"],
                address=row["pci.bus_id"].lower()[-12:],
                capability=row["compute_cap"],
                total_bytes=_bytes(row["memory.total"]),
                free_bytes=_bytes(row["memory.free"]),
                driver=row["driver_version"],
                link_gen=_count(row["pcie.link.gen.max"]),
                card_gen=_count(row["pcie.link.gen.gpumax"]),
                link_width=_count(row["pcie.link.width.current"]),
                card_width=_count(row["pcie.link.width.max"]),
                persistence=row["persistence_mode"],
                power_limit_w=_number(row["power.limit"]),
            )
        )
    return Cards(tuple(cards))


def plugged_in(machine: Machine) -> list[str]:
    """Addresses of NVIDIA display devices on the bus, whether or not a driver answers."""
    found = []
    for address in machine.names(DEVICES):
        if machine.text(f"{DEVICES}/{address}/vendor") == NVIDIA:
            kind = machine.text(f"{DEVICES}/{address}/class") or ""
            if kind.startswith(DISPLAY):
                found.append(address)
    return found


def path_between(machine: Machine, pair: tuple[Card, Card]) -> str | None:
    """What nvidia-smi calls the path of two cards: NV#, PIX, PXB, PHB, NODE, SYS."""
    asked = machine.run(TOPOLOGY, SMI_S)
    rows = re.sub(r"\x1b\[[0-9;]*m", "", asked.out).splitlines()
    heads = next((line.split() for line in rows if "GPU0" in line), [])
    a, b = (f"GPU{card.index}" for card in pair)
    for line in rows:
        words = line.split()
        if words[:1] == [a] and b in heads and len(words) > heads.index(b) + 1 and words != heads:
            return words[heads.index(b) + 1]
    return None


def bar1_bytes(machine: Machine, card: Card) -> int | None:
    """Size of the window through which others reach the card's memory."""
    lines = (machine.text(f"{DEVICES}/{card.address}/resource") or "").splitlines()
    if len(lines) < 2:
        return None
    start, end, _ = (int(word, 16) for word in lines[1].split())
    return end - start + 1 if end else None


# --------------------------------------------------------------------------------- bridges


def bridges_above(machine: Machine, card: Card) -> list[str]:
    """From the root port down to the card, without it."""
    real = machine.real(f"{DEVICES}/{card.address}") or ""
    found = [part for part in real.split("/") if ADDRESS.fullmatch(part)]
    return found[:-1]


def bridges_between(machine: Machine, pair: tuple[Card, Card]) -> list[str]:
    """The ports that a write from one card to the other passes, less those that both are below."""
    a, b = (bridges_above(machine, card) for card in pair)
    return [port for port in a if port not in b] + [port for port in b if port not in a]


@dataclass(frozen=True)
class Ports:
    """ACS of bridges. redirecting: with their control word; unread: for want of root."""

    redirecting: dict[str, int]
    unread: tuple[str, ...]
    num_read: int


def acs_control(config: bytes) -> int | None:
    """The ACS control word in configuration space; None where there is no such capability."""
    at = EXTENDED
    for _ in range(64):  # a list that goes in circles ends here
        header = int.from_bytes(config[at : at + 4], "little")
        if header in (0, 0xFFFFFFFF):
            return None
        if header & 0xFFFF == ACS:
            return int.from_bytes(config[at + ACS_CONTROL : at + ACS_CONTROL + 2], "little")
        at = header >> 20
        if at < EXTENDED:
            return None
    return None


def read_acs(machine: Machine, bridges: list[str]) -> Ports:
    """Read the ACS control words."""
    redirecting, unread, num_read = {}, [], 0
    for bridge in bridges:
        config = machine.data(f"{DEVICES}/{bridge}/config") or b""
        if len(config) <= WITHOUT_ROOT:  # so it is, too, for root in most containers
            unread.append(bridge)
            continue
        num_read += 1
        control = acs_control(config)
        if control is not None and control & (REQUEST_REDIRECT | COMPLETION_REDIRECT):
            redirecting[bridge] = control
    return Ports(redirecting, tuple(unread), num_read)


# ----------------------------------------------------------------------------------- IOMMU


@dataclass(frozen=True)
class Iommu:
    """units: dmar0, ivhd0, ..; none: it is off. domains: of the cards; None: cannot be read.

    A domain is identity where nothing is translated, else DMA or DMA-FQ. options: those of the
    kernel's command line that concern it.
    """

    units: tuple[str, ...]
    domains: tuple[str | None, ...]
    options: tuple[str, ...]

    @property
    def translates(self) -> bool | None:
        """Whether the cards' writes are translated; None: cannot be told."""
        if not self.units:
            return False
        known = [domain for domain in self.domains if domain]
        if not known:
            return None
        return any(domain != "identity" for domain in known)


def read_iommu(machine: Machine, cards: tuple[Card, ...]) -> Iommu:
    """Which IOMMU there is, and what it does for the cards."""
    words = (machine.text("/proc/cmdline") or "").split()
    options = tuple(w for w in words if w.split("=")[0] in ("iommu", "intel_iommu", "amd_iommu"))
    domains = tuple(machine.text(f"{DEVICES}/{card.address}/iommu_group/type") for card in cards)
    return Iommu(tuple(machine.names("/sys/class/iommu")), domains, options)
