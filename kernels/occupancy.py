"""How many blocks of a kernel one multiprocessor holds: the arithmetic of NVIDIA's calculator.

Limits are those of the CUDA programming guide's table of compute capabilities; granularities and
the order of rounding are those of `cuda_occupancy.h`.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTER_GRANULARITY = 256  # registers of a warp
SHARED_GRANULARITY = 128  # bytes of a block
PARTITIONS = 4  # of a multiprocessor; a warp's registers lie in one
RESERVED_SHARED_BYTES = 1024  # of each block, for the system


@dataclass(frozen=True)
class Device:
    """A GPU: its limits, per multiprocessor unless said otherwise."""

    name: str
    multiprocessors: int
    capability: tuple[int, int]
    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 64 * 1024

    @property
    def shared_bytes_per_block(self) -> int:
        """The most that a block can ask for, static and dynamic."""
        return self.shared_bytes - RESERVED_SHARED_BYTES


# One card for each architecture that the library holds code for.
DEVICES = {
    "sm_80": Device("A100", 108, (8, 0), 64, 32, 164 * 1024),
    "sm_90": Device("H100 SXM", 132, (9, 0), 64, 32, 228 * 1024),
    "sm_120a": Device("RTX PRO 6000", 188, (12, 0), 48, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps that one multiprocessor holds at once, and what limits them."""

    blocks: int
    warps: int
    limited_by: str  # registers, shared memory, warps or blocks


def occupancy(device: Device, registers: int, shared_bytes: int, threads: int) -> Occupancy:
    """Compute the occupancy of a kernel.

    Args:
        registers: of a thread.
        shared_bytes: of a block, static and dynamic, without what the system reserves.
        threads: of a block.
    Returns:
        blocks = 0 where the device cannot run it.
    """
    block_warps = -(-threads // WARP)
    warp_registers = _up(registers * WARP, REGISTER_GRANULARITY)
    partition_warps = device.registers // PARTITIONS // warp_registers
    block_shared = _up(shared_bytes + RESERVED_SHARED_BYTES, SHARED_GRANULARITY)
    limits = {  # of equal ones the first is named
        "warps": device.warps // block_warps,
        "blocks": device.blocks,
        "registers": partition_warps * PARTITIONS // block_warps,
        "shared memory": device.shared_bytes // block_shared,
    }
    limited_by = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limited_by], limits[limited_by] * block_warps, limited_by)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
