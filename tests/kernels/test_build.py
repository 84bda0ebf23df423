"""The build of the kernels, with a stand-in for nvcc that notes its calls."""

import json
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.kernels.config import parse_config
from kernels import build
from kernels.build import BuildConfig, BuildError, library_path
from kernels.folder_lock import FolderLock
from kernels.toolchain import Nvcc, ToolMissing

FAKE_NVCC = Path(__file__).with_name("fake_nvcc.py")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two sources and a header, to be built with the stand-in."""
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "long.cu").write_text("a kernel, and another one")
    (csrc / "short.cu").write_text("a kernel")
    (csrc / "common.cuh").write_text("what both include")
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    for name in ("FAKE_VERSION", "FAKE_LINK_FAILS", build.FOLDER_ENV):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NVCC_CCBIN", "g++")  # the stand-in needs none
    monkeypatch.setenv("NVCC", str(executable(tmp_path / "nvcc")))
    return BuildConfig(tmp_path / "out", csrc=csrc)


def executable(path: Path) -> Path:
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE_NVCC} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def calls(config) -> list[list[str]]:
    path = config.folder.parent / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def compiled(config) -> list[str]:
    return [Path(c[c.index("-c") + 1]).name for c in calls(config) if "-c" in c]


def test_every_source_is_compiled_for_every_architecture_and_linked_once(config):
    library = build.build(config)
    assert library.read_text().count("object of") == 2
    assert compiled(config) == ["long.cu", "short.cu"]  # the largest first
    for call in calls(config)[:2]:
        codes = [call[i + 1] for i, argument in enumerate(call) if argument == "-gencode"]
        assert codes == [
            "arch=compute_80,code=sm_80",
            "arch=compute_90,code=sm_90",
            "arch=compute_120a,code=sm_120a",
        ]
    link = calls(config)[2]
    assert link[link.index("-cudart") + 1] == "static"
    assert library_path(config.folder, config.csrc) == library


def test_a_second_build_runs_no_compiler(config, capsys, monkeypatch):
    build.build(config)
    before = calls(config)
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")  # none is needed either
    build.build(config)
    assert calls(config) == before
    assert "is up to date" in capsys.readouterr().out


def test_only_the_file_that_changed_is_compiled_again(config):
    build.build(config)
    (config.csrc / "short.cu").write_text("another kernel")
    library = build.build(config)
    assert compiled(config) == ["long.cu", "short.cu", "short.cu"]
    assert "another kernel" in library.read_text()


def test_a_changed_header_compiles_every_file_again(config):
    build.build(config)
    (config.csrc / "common.cuh").write_text("something else")
    build.build(config)
    assert compiled(config) == ["long.cu", "short.cu"] * 2


def test_objects_of_earlier_sources_are_removed(config):
    build.build(config)
    (config.csrc / "short.cu").write_text("another kernel")
    build.build(config)
    names = {path.name.split("-")[0] for path in (config.folder / build.OBJECTS).iterdir()}
    assert names == {"long", "short", "exports.map"}
    assert len(list((config.folder / build.OBJECTS).iterdir())) == 5  # two of each, the map


def test_what_ptxas_said_is_kept_beside_each_object(config):
    build.build(config)
    for name in build.read_stamp(config.folder).objects:
        kept = (config.folder / build.OBJECTS / name).with_suffix(".ptxas.txt").read_text()
        assert kept == f"ptxas info of {name.split('-')[0]}.cu\n"


def test_fewer_architectures_are_another_library(config):
    build.build(config)
    build.build(replace(config, architectures=("sm_120a", "sm_90")))
    assert build.read_stamp(config.folder).architectures == ("sm_90", "sm_120a")
    assert "arch=compute_80,code=sm_80" not in calls(config)[-2]
    assert compiled(config) == ["long.cu", "short.cu"] * 2


def test_jobs_beyond_the_files_compile_architectures_side_by_side(config):
    build.build(replace(config, jobs=6))
    assert all(c[c.index("--threads") + 1] == "3" for c in calls(config) if "-c" in c)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ("sm_75",)}, r"architectures = \('sm_75',\); there are sm_80, sm_90"),
        ({"architectures": ()}, r"architectures = \(\)"),
        ({"jobs": 0}, "jobs = 0; at least 1"),
    ],
)
def test_a_wrong_configuration_is_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_a_file_that_does_not_compile_leaves_the_library_and_names_the_first_error(config):
    library = build.build(config)
    before = library.read_text()
    (config.csrc / "short.cu").write_text("FAIL")
    with pytest.raises(BuildError, match=r"short.cu does not compile: short.cu\(2\): error: bad"):
        build.build(config)
    assert library.read_text() == before
    with pytest.raises(RuntimeError, match="is stale"):
        library_path(config.folder, config.csrc)
    (config.csrc / "short.cu").write_text("a kernel")
    assert library_path(config.folder, config.csrc) == library


def test_objects_that_do_not_link_leave_the_library(config, monkeypatch):
    library = build.build(config)
    before = library.read_text()
    (config.csrc / "short.cu").write_text("another kernel")
    monkeypatch.setenv("FAKE_LINK_FAILS", "1")
    with pytest.raises(BuildError, match="do not link: .*undefined reference to `f'"):
        build.build(config)
    assert library.read_text() == before


def test_a_file_that_changes_while_it_compiles_gives_no_object(config):
    (config.csrc / "short.cu").write_text("EDIT")
    with pytest.raises(BuildError, match=r"short.cu or a header changed while it compiled"):
        build.build(config)
    assert not list((config.folder / build.OBJECTS).glob("short-????????????????.o"))
    assert build.build(config).read_text().endswith("object of short.cu: edited\n")


def test_a_folder_without_sources_is_refused(config):
    for path in config.csrc.glob("*.cu"):
        path.unlink()
    with pytest.raises(BuildError, match=r"there is no \*.cu in "):
        build.build(config)


def test_without_a_host_compiler_nothing_is_compiled(config, monkeypatch):
    monkeypatch.delenv("NVCC_CCBIN")
    monkeypatch.setenv("PATH", str(config.csrc))
    with pytest.raises(ToolMissing, match=r"nvcc needs g\+\+"):
        build.build(config)


def test_a_library_that_is_not_built_is_one_line_with_the_command(config):
    with pytest.raises(RuntimeError, match="is not built; run `make kernels`") as caught:
        library_path(config.folder, config.csrc)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", [build.STAMP, build.LIBRARY])
def test_a_library_without_its_stamp_is_not_built(config, lost):
    build.build(config)
    (config.folder / lost).unlink()
    with pytest.raises(RuntimeError, match="is not built"):
        library_path(config.folder, config.csrc)


@pytest.mark.parametrize("changed", ["short.cu", "common.cuh", "new.cu"])
def test_a_library_of_other_sources_is_one_line_with_the_command(config, changed):
    build.build(config)
    (config.csrc / changed).write_text("something else")
    with pytest.raises(RuntimeError, match="is stale: .*run `make kernels`") as caught:
        library_path(config.folder, config.csrc)
    assert "\n" not in str(caught.value)


def test_a_library_of_other_flags_is_stale(config, monkeypatch):
    build.build(config)
    monkeypatch.setattr(build, "COMPILE", (*build.COMPILE, "-G"))
    with pytest.raises(RuntimeError, match="is stale"):
        library_path(config.folder, config.csrc)


def test_the_folder_is_the_one_that_the_environment_names(config, monkeypatch):
    assert build.library_folder() == build.ROOT / "build" / "kernels"
    monkeypatch.setenv(build.FOLDER_ENV, str(config.folder))
    assert build.library_folder() == config.folder


def test_the_command_builds_into_that_folder(config, monkeypatch, capsys):
    monkeypatch.setenv(build.FOLDER_ENV, str(config.folder))
    assert build.main(["--arch", "sm_90", "--jobs", "1"]) == 0
    assert build.read_stamp(config.folder).architectures == ("sm_90",)
    assert str(config.folder / build.LIBRARY) in capsys.readouterr().out


def test_the_command_fails_where_another_process_builds(config, monkeypatch, capsys):
    monkeypatch.setenv(build.FOLDER_ENV, str(config.folder))
    config.folder.mkdir()
    held = FolderLock(config.folder, "testing", "build.lock")
    assert build.main([]) == 1
    held.release()
    assert "is held by process" in capsys.readouterr().err


def test_a_compiler_is_installed_only_where_that_was_asked_for(config, monkeypatch):
    nvcc = Nvcc(config.folder.parent / "nvcc", "13.0.88", config.folder)
    monkeypatch.delenv("NVCC")
    installed = []

    def find_nvcc():
        if not installed:
            raise ToolMissing("none")
        return nvcc

    monkeypatch.setattr(build.toolchain, "find_nvcc", find_nvcc)
    monkeypatch.setattr(build.toolchain, "install", installed.append)
    with pytest.raises(ToolMissing):
        build.build(config)
    assert installed == []
    build.build(config, install=True)
    assert installed == ["nvcc"]


def test_the_commands_of_the_docs_are_known(monkeypatch):
    text = (build.ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    commands = [line for block in text.split("```")[1::2] for line in block.strip().splitlines()]
    built = []
    monkeypatch.setattr(build, "build", lambda config, install: built.append(config))
    for command in commands:
        if command.startswith("make "):
            assert f"\n{command.split()[1]}:" in (build.ROOT / "Makefile").read_text()
        else:
            program, *arguments = command.removeprefix("python -m ").split()
            if program == "bench.kernels":
                assert str(parse_config(arguments).dispatch_table) == "FILE"
                continue
            assert program == "kernels.build"
            assert build.main(arguments) == 0
    assert [(config.architectures, config.jobs) for config in built] == [(("sm_90",), 4)]
    assert len(commands) == 4
