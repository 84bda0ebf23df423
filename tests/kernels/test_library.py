"""The library that `make kernels` built, on a machine that need not have a GPU or its driver."""

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from kernels import build, dry_run, inspection, toolchain
from kernels.occupancy import DEVICES
from kernels.ops import GemmArgs, MoeArgs
from kernels.toolchain import ToolMissing
from scripts.list_architectures import read_library

try:
    PATH = build.library_path()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def path():
    return PATH


@pytest.fixture(scope="module")
def library(path):
    loaded = ctypes.CDLL(str(path))
    loaded.dsv4_moe_workspace_bytes.restype = ctypes.c_size_t
    loaded.dsv4_gemm_workspace_bytes.restype = ctypes.c_size_t
    loaded.dsv4_error_string.restype = ctypes.c_char_p
    return loaded


# Pointers stay null: nothing is to be launched.
MOE = {"num_tokens": 1, "top_k": 6, "num_experts": 256, "hidden_size": 4096, "inter_size": 1024}
GEMM = {"size_m": 1, "size_n": 4096, "size_k": 4096}


def test_it_holds_code_for_the_three_architectures_and_none_to_compile_at_run_time(path):
    found = read_library(path.name, path.read_bytes())
    assert set(found.elf) == set(build.ARCHITECTURES)
    assert not found.ptx


def test_it_exports_the_c_abi_and_nothing_else(path):
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    command = ["nm", "--dynamic", "--defined-only", path]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    headers = "".join((build.CSRC / name).read_text() for name in ("w4a16.h", "allreduce.h"))
    declared = re.findall(r"^(?:int|size_t|const char\*) (dsv4_\w+)\(", headers, re.MULTILINE)
    assert sorted(line.split()[-1] for line in listed.splitlines()) == sorted(set(declared))


def test_it_needs_the_c_library_only(path):
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    command = ["readelf", "--dynamic", path]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"Shared library: \[(\S+?)\]", listed)
    assert [name for name in needed if not name.startswith(("libc.", "ld-linux"))] == []


def test_errors_have_a_text(library):
    assert library.dsv4_error_string(1) == b"invalid argument"


def test_supported_sizes_have_a_workspace(library):
    assert library.dsv4_moe_workspace_bytes(*MOE.values()) > 0
    assert library.dsv4_gemm_workspace_bytes(*GEMM.values()) > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_tokens", -1),
        ("top_k", 0),
        ("num_experts", 0),
        ("hidden_size", 4096 - 64),
        ("hidden_size", 0),
        ("inter_size", 1024 + 64),
        ("inter_size", -128),
    ],
)
def test_an_moe_of_unsupported_sizes_is_refused_without_a_gpu(library, name, value):
    sizes = {**MOE, name: value}
    assert library.dsv4_moe_workspace_bytes(*sizes.values()) == 0
    error = library.dsv4_moe(ctypes.byref(MoeArgs(**sizes)), None)
    assert library.dsv4_error_string(error) == b"invalid argument"


@pytest.mark.parametrize(
    ("name", "value"), [("size_m", -1), ("size_n", 96), ("size_n", 0), ("size_k", 192)]
)
def test_a_gemm_of_unsupported_sizes_is_refused_without_a_gpu(library, name, value):
    sizes = {**GEMM, name: value}
    assert library.dsv4_gemm_workspace_bytes(*sizes.values()) == 0
    error = library.dsv4_gemm(ctypes.byref(GemmArgs(**sizes)), None)
    assert library.dsv4_error_string(error) == b"invalid argument"


@pytest.mark.parametrize(("num_rows", "inter_size"), [(-1, 1024), (1, 0), (1, 40)])
def test_a_silu_of_unsupported_sizes_is_refused_without_a_gpu(library, num_rows, inter_size):
    limit = ctypes.c_float(10.0)
    error = library.dsv4_silu_interleaved(None, None, num_rows, inter_size, limit, None)
    assert library.dsv4_error_string(error) == b"invalid argument"


def test_no_tokens_are_no_launch_and_no_error(library):
    assert library.dsv4_moe(ctypes.byref(MoeArgs(**{**MOE, "num_tokens": 0})), None) == 0
    assert library.dsv4_gemm(ctypes.byref(GemmArgs(**{**GEMM, "size_m": 0})), None) == 0
    assert library.dsv4_silu_interleaved(None, None, 0, 1024, ctypes.c_float(10.0), None) == 0


@pytest.fixture(scope="module")
def kernels(path):
    try:
        return inspection.inspect(path.parent)[0]
    except ToolMissing as error:
        pytest.skip(str(error))


def test_no_kernel_spills_and_all_read_weights_16_bytes_at_a_time(kernels):
    assert [line for kernel in kernels for line in inspection.problems_of(kernel)] == []
    assert any(kernel.sass.mma for kernel in kernels)


def test_decoding_is_two_launches_the_second_dependent_on_the_first(kernels):
    for case in ("moe M=1 TP2", "moe M=4 TP2"):
        made = [
            (launch.number, launch.dependent)
            for kernel in kernels
            for launch in kernel.launches["sm_120a"]
            if launch.case == case
        ]
        assert len(made) == 2
        assert sorted(made)[1][1]


def test_every_kernel_is_launched_by_the_dry_run(kernels):
    assert [kernel.name for kernel in kernels if not kernel.launches["sm_120a"]] == []


def test_the_dry_run_refuses_what_a_device_would(path, tmp_path):
    try:
        nvcc = toolchain.find_nvcc()
    except ToolMissing as error:
        pytest.skip(str(error))
    objects = [path.parent / build.OBJECTS / name for name in build.read_stamp(path.parent).objects]
    program = dry_run.compile_dry_run(objects, nvcc, tmp_path / "dry_run")
    small = replace(DEVICES["sm_80"], name="a small card", shared_bytes=33 * 1024)
    assert len(dry_run.run(program, DEVICES["sm_120a"])) > 30
    with pytest.raises(RuntimeError, match=r"dry run for a small card: dsv4_\w+, case .*: "):
        dry_run.run(program, small)
