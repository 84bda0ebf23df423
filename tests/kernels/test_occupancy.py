"""Occupancy beside what NVIDIA's own calculator, cuda_occupancy.h of CUDA 13.0, gave."""

import pytest

from kernels.occupancy import DEVICES, Occupancy, occupancy

# architecture, registers, static + dynamic bytes, threads: blocks
CALCULATED = [
    ("sm_80", 128, 48688, 256, 2),
    ("sm_80", 32, 300, 32, 32),
    ("sm_80", 32, 300, 256, 8),
    ("sm_80", 255, 300, 256, 1),
    ("sm_90", 128, 48688, 256, 2),
    ("sm_90", 64, 79472, 256, 2),
    ("sm_90", 40, 300, 96, 16),
    ("sm_120a", 128, 48688, 256, 2),
    ("sm_120a", 40, 300, 256, 6),
    ("sm_120a", 32, 300, 32, 24),
    ("sm_120a", 72, 300, 480, 1),
    ("sm_120a", 72, 300, 96, 9),
    ("sm_120a", 16, 50000, 128, 2),
    ("sm_120a", 16, 51300, 128, 1),
    ("sm_120a", 16, 101376, 128, 1),
    ("sm_120a", 16, 101377, 128, 0),
    ("sm_120a", 255, 300, 288, 0),
]


@pytest.mark.parametrize(("arch", "registers", "shared", "threads", "blocks"), CALCULATED)
def test_blocks_are_those_of_nvidias_calculator(arch, registers, shared, threads, blocks):
    assert occupancy(DEVICES[arch], registers, shared, threads).blocks == blocks


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "limited_by"),
    [
        (128, 1024, 256, "registers"),
        (40, 65792, 256, "shared memory"),
        (40, 1024, 256, "warps"),
        (16, 0, 32, "blocks"),
    ],
)
def test_what_limits_is_named(registers, shared, threads, limited_by):
    assert occupancy(DEVICES["sm_120a"], registers, shared, threads).limited_by == limited_by


def test_warps_are_those_of_all_resident_blocks():
    assert occupancy(DEVICES["sm_120a"], 128, 0, 250) == Occupancy(2, 16, "registers")
