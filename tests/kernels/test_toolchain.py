"""Where the CUDA tools are found, and what is installed; nothing is downloaded here."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import toolchain
from kernels.toolchain import ToolMissing, find_cuobjdump, find_nvcc

FAKE_NVCC = Path(__file__).with_name("fake_nvcc.py")


def fake_nvcc(folder: Path, version: str) -> Path:
    """A program called nvcc, of a version."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvcc"
    path.write_text(f'#!/bin/sh\nFAKE_VERSION={version} exec {sys.executable} {FAKE_NVCC} "$@"\n')
    path.chmod(0o755)
    return path


def installed(tool: str, cache: Path) -> Path:
    """The folder of programs of an installed tool."""
    site = toolchain._folder(tool, cache) / "lib" / "python3.11" / "site-packages"
    return site / "nvidia" / "cu13" / "bin"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; no CUDA tool is on PATH, and NVCC is not set."""
    monkeypatch.delenv(toolchain.NVCC_ENV, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "cache"


def test_the_compiler_that_the_environment_names_comes_first(cache, tmp_path, monkeypatch):
    fake_nvcc(tmp_path / "bin", "13.1.0")
    named = fake_nvcc(tmp_path / "named", "12.9.86")
    monkeypatch.setenv(toolchain.NVCC_ENV, str(named))
    found = find_nvcc(cache)
    assert (found.path, found.version, found.top) == (named, "12.9.86", FAKE_NVCC.parent)


def test_then_the_one_on_path(cache, tmp_path):
    on_path = fake_nvcc(tmp_path / "bin", "13.1.0")
    fake_nvcc(installed("nvcc", cache), "13.0.88")
    assert find_nvcc(cache).path == on_path


@pytest.mark.parametrize("on_path", [None, "12.4.131"])
def test_then_the_installed_one(cache, tmp_path, on_path):
    if on_path:
        fake_nvcc(tmp_path / "bin", on_path)
    path = fake_nvcc(installed("nvcc", cache), "13.0.88")
    assert find_nvcc(cache).path == path


def test_one_that_is_installed_for_another_lock_is_not_taken(cache, monkeypatch, tmp_path):
    fake_nvcc(installed("nvcc", cache), "13.0.88")
    monkeypatch.setattr(toolchain, "_requirements", lambda tool: FAKE_NVCC)
    with pytest.raises(ToolMissing, match="there is no nvcc on PATH"):
        find_nvcc(cache)


def test_no_compiler_is_one_line_with_the_remedies(cache):
    with pytest.raises(ToolMissing) as caught:
        find_nvcc(cache)
    assert str(caught.value) == (
        "kernels: there is no nvcc on PATH; sm_120a needs nvcc 12.8 or newer; "
        "set NVCC, or run `make kernels`"
    )


def test_an_old_compiler_is_named_with_its_version(cache, tmp_path):
    old = fake_nvcc(tmp_path / "bin", "12.7.99")
    with pytest.raises(ToolMissing, match=f"{old} is 12.7.99; sm_120a needs nvcc 12.8 or newer"):
        find_nvcc(cache)


def test_an_old_compiler_that_the_environment_names_is_not_passed_over(
    cache, tmp_path, monkeypatch
):
    fake_nvcc(tmp_path / "bin", "13.0.88")
    monkeypatch.setenv(toolchain.NVCC_ENV, str(fake_nvcc(tmp_path / "named", "12.4.131")))
    with pytest.raises(ToolMissing, match=r"NVCC=.* is 12.4.131"):
        find_nvcc(cache)


def test_a_name_that_is_no_compiler_is_refused(cache, monkeypatch):
    monkeypatch.setenv(toolchain.NVCC_ENV, "/nowhere/nvcc")
    with pytest.raises(ToolMissing, match="/nowhere/nvcc --version: No such file"):
        find_nvcc(cache)
    monkeypatch.setenv(toolchain.NVCC_ENV, shutil.which("true", path="/usr/bin:/bin"))
    with pytest.raises(ToolMissing, match="gives no version"):
        find_nvcc(cache)


def test_a_disassembler_without_nvdisasm_is_passed_over(cache, tmp_path):
    for folder in (tmp_path / "bin", tmp_path / "cuda" / "bin"):
        folder.mkdir(parents=True)
        (folder / "cuobjdump").touch(mode=0o755)
    with pytest.raises(ToolMissing, match="no cuobjdump with nvdisasm .*make kernels-report"):
        find_cuobjdump(tmp_path / "cuda", cache)
    (tmp_path / "cuda" / "bin" / "nvdisasm").touch(mode=0o755)
    assert find_cuobjdump(tmp_path / "cuda", cache) == tmp_path / "cuda" / "bin" / "cuobjdump"
    (tmp_path / "bin" / "nvdisasm").touch(mode=0o755)
    assert find_cuobjdump(tmp_path / "cuda", cache) == tmp_path / "bin" / "cuobjdump"


@pytest.mark.parametrize("tool", ["nvcc", "cuobjdump"])
def test_what_is_installed_is_locked_with_hashes(cache, monkeypatch, tool):
    commands = []

    def run(command):
        commands.append([str(part) for part in command])
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(toolchain, "_run", run)
    toolchain.install(tool, cache)
    pip = commands[1]
    assert "--require-hashes" in pip
    requirements = Path(pip[pip.index("-r") + 1])
    assert requirements.name == f"{tool}.txt"
    pinned = re.split(r"\n(?=\S)", requirements.read_text().strip())
    assert all(re.match(r"nvidia-[a-z-]+==13\.[\d.]+ \\\n +--hash=sha256:", p) for p in pinned)
    wanted = re.findall(r"^nvidia-\S+", requirements.with_suffix(".in").read_text(), re.MULTILINE)
    assert sorted(wanted) == sorted(p.split()[0] for p in pinned)


def test_an_installation_that_fails_leaves_nothing_that_is_found(cache, monkeypatch):
    def run(command):
        if "venv" in command:
            fake_nvcc(Path(command[-1]) / "lib/python3.11/site-packages/nvidia/cu13/bin", "13.0.88")
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, 1, "", "ERROR: x\nERROR: no such package")

    with monkeypatch.context() as patch:
        patch.setattr(toolchain, "_run", run)
        with pytest.raises(ToolMissing, match="installing requirements/nvcc.txt failed: ERROR: no"):
            toolchain.install("nvcc", cache)
    with pytest.raises(ToolMissing, match="there is no nvcc"):
        find_nvcc(cache)
