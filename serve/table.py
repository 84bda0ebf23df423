"""`serve profiles`: what each profile needs, and whether it fits this machine."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from serve.engine import REPOSITORY
from serve.errors import PlanError
from serve.plan import GIB, MIB, plan_profile
from serve.profiles import Device, Profile, load_profile, profile_names

# The CPU engine's three processes took 2.5 GiB with the tiny model, 1 GiB of KV cache among it.
CPU_PROCESSES_BYTES = 2 * GIB
QUERY = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
QUERY_S = 20


@dataclass(frozen=True)
class Machine:
    """Memory of each GPU, and what of the main memory is available. Bytes."""

    card_bytes: tuple[int, ...]
    available_bytes: int


@dataclass(frozen=True)
class Row:
    """One profile. need_bytes: of each card, or of main memory. fits: on this machine."""

    name: str
    device: str
    num_cards: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_dtype: str
    num_speculative_tokens: int
    need_bytes: int
    fits: bool
    reason: str


def this_machine() -> Machine:
    """Ask nvidia-smi and the kernel; no nvidia-smi is no card."""
    try:
        asked = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_S, check=True)
        cards = tuple(int(line) * MIB for line in asked.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        cards = ()
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    memory = dict(line.split(":", 1) for line in lines)
    return Machine(cards, int(memory["MemAvailable"].split()[0]) * 1024)


def profile_row(profile: Profile, machine: Machine, model: Path | None = None) -> Row:
    """What the profile needs by its plan, and whether the machine has it.

    Without `model` GPU profiles are planned on the bundled shapes of DeepSeek-V4-Flash.
    """
    if profile.device is Device.CPU:
        folder = model or REPOSITORY / profile.model
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        need = weights + profile.cpu_kv_cache_gib * GIB + CPU_PROCESSES_BYTES
        have, cards, problem = machine.available_bytes, 0, ""
    else:
        cards = profile.tensor_parallel_size
        try:
            plan, _ = plan_profile(profile, model)
        except PlanError as error:
            need, problem = 0, str(error)
        else:
            need = plan.usable_bytes - plan.spare_bytes
            problem = "" if plan.fits else f"over the share of {profile.gpu_memory_utilization:.0%}"
        if len(machine.card_bytes) < cards:
            problem = problem or f"{len(machine.card_bytes)} of {cards} GPUs"
        have = min(sorted(machine.card_bytes, reverse=True)[:cards], default=0)
    if not problem and need > have:
        problem = f"has {have / GIB:.1f} GiB"
    return Row(
        name=profile.name,
        device=profile.device.value,
        num_cards=cards,
        max_model_len=profile.max_model_len,
        max_num_seqs=profile.max_num_seqs,
        max_num_batched_tokens=profile.max_num_batched_tokens,
        kv_cache_dtype=profile.kv_cache_dtype.value,
        num_speculative_tokens=profile.num_speculative_tokens,
        need_bytes=need,
        fits=not problem,
        reason=problem,
    )


def render_rows(rows: list[Row]) -> str:
    """The table as text."""
    lines = [
        f"{'profile':<13}{'window':>9}{'streams':>9}{'batch':>7}{'KV':>6}{'MTP':>5}"
        f"{'needs':>17}  fits here"
    ]
    for row in rows:
        cards = f"{row.num_cards} x " if row.num_cards else ""
        need = f"{cards}{row.need_bytes / GIB:.1f} GiB"
        lines.append(
            f"{row.name:<13}{row.max_model_len:>9,}{row.max_num_seqs:>9}"
            f"{row.max_num_batched_tokens:>7,}{row.kv_cache_dtype:>6}"
            f"{row.num_speculative_tokens:>5}{need:>17}  "
            + ("yes" if row.fits else f"no: {row.reason}")
        )
    return "\n".join(lines)


def run_profiles(as_json: bool) -> None:
    """Print the table of all profiles."""
    machine = this_machine()
    rows = [profile_row(load_profile(name), machine) for name in profile_names()]
    rows.sort(key=lambda row: (row.device, row.max_model_len, row.max_num_seqs))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(render_rows(rows))
