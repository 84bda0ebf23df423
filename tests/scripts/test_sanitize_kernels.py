"""The sanitizer's run and the driver that it watches; both for real need a GPU."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from kernels import reference, tiled
from kernels.toolchain import ToolMissing
from scripts import sanitize_driver, sanitize_kernels
from scripts.sanitize_kernels import CONTROLS, TOOLS, Run, count_errors, judge, judge_control

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
FOUND = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 16 bytes
=========     at dsv4::decode_down+0x10
========= ERROR SUMMARY: 33 errors
========= ERROR SUMMARY: 13 errors were not printed. Use --print-limit option to adjust the number
"""
NO_RACES = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings) \n"
RACES = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings) \n"
CASES = 3


@pytest.mark.parametrize(
    ("log", "errors"),
    [(CLEAN, 0), (FOUND, 33), (NO_RACES, 0), (RACES, 1), ("", None), ("========= Error: x", None)],
)
def test_errors_are_those_that_the_log_sums_up(log, errors):
    assert count_errors(log) == errors


def run(tool="memcheck", errors=0, exit_status=0, cases=CASES) -> Run:
    lines = ({"device": "H100"}, *({"case": str(i), "error": 0.0} for i in range(cases)))
    return Run(tool, errors, exit_status, 1.0, lines, ())


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, None),
        ({"errors": 2, "exit_status": 86}, "memcheck: 2 errors"),
        ({"errors": None, "exit_status": 255}, "memcheck: no summary, exit status 255"),
        ({"errors": None, "exit_status": None}, "memcheck: not done after 1 s"),
        ({"cases": 2}, "memcheck: 2 of 3 cases, exit status 0"),
        ({"exit_status": 1}, "memcheck: 3 of 3 cases, exit status 1"),
    ],
)
def test_a_tool_passes_only_with_every_case_and_no_error(changes, wrong):
    assert judge(run(**changes), CASES) == wrong


def test_a_planted_fault_must_be_reported():
    assert judge_control(run(errors=1, exit_status=86)) is None
    assert "an output that is too short was planted" in judge_control(run(errors=0))
    assert "no summary" in judge_control(run(errors=None, exit_status=255))


FAKE = """
import json, pathlib, sys
options, driver = sys.argv[1:], sys.argv[sys.argv.index("scripts.sanitize_driver") + 1:]
if options == ["--version"]:
    print("Version 2025.3.1.0 (build 1)")
    sys.exit()
value = lambda name: options[options.index(name) + 1]
plan = json.loads(pathlib.Path(__file__).with_name("plan.json").read_text())
tool = value("--tool")
errors, cases, status = plan[f"{tool} {driver[0]}"]
assert value("--kernel-name") == "kns=dsv4"
word = "RACECHECK SUMMARY: %d hazards displayed (%d errors, 0 warnings)" % (errors, errors)
if tool != "racecheck":
    word = "ERROR SUMMARY: %d errors" % errors
pathlib.Path(value("--log-file")).write_text("========= found it\\n========= " + word + "\\n")
print(json.dumps({"device": "H100", "capability": "9.0"}))
for i in range(cases):
    print(json.dumps({"case": str(i), "error": 0.001}))
print("a line of PyTorch's")
sys.exit(status)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(**changes of "tool driver" -> (errors, cases, status)): a sanitizer that says so."""
    tool = tmp_path / "compute-sanitizer"
    body = textwrap.dedent(FAKE).replace(
        'sys.argv[sys.argv.index("scripts.sanitize_driver") + 1:]',
        '(sys.argv[sys.argv.index("scripts.sanitize_driver") + 1:] '
        'if "scripts.sanitize_driver" in sys.argv else [])',
    )
    tool.write_text(f"#!{sys.executable}\n{body}")
    tool.chmod(0o755)
    library = tmp_path / "libplanted.so"
    monkeypatch.setattr(sanitize_kernels, "compile_planted", lambda _: (library, None))
    monkeypatch.setattr(sanitize_kernels.build, "library_path", lambda: library)
    monkeypatch.setattr(sanitize_driver, "NUM_CASES", CASES)

    def plan(changes=()):
        told = {f"{name} all": (0, CASES, 0) for name in TOOLS}
        told |= {f"{name} {word}": (5, 0, 86) for name, (_, word, _) in CONTROLS.items()}
        (tmp_path / "plan.json").write_text(json.dumps(told | dict(changes)))
        return tool

    return plan


def sanitize(tool: Path, out: Path, *more: str) -> int:
    return sanitize_kernels.main(["--sanitizer", str(tool), "--out", str(out), *more])


def test_clean_tools_that_report_their_faults_pass(fake, tmp_path, capsys):
    out = tmp_path / "new" / "out.json"
    assert sanitize(fake(), out, "--commit", "abc") == 0
    result = json.loads(out.read_text())
    assert set(result["tools"]) == set(TOOLS) == set(result["controls"])
    assert result["wrong"] == []
    assert result["controls"]["memcheck"]["errors"] == 5
    where = result["provenance"]
    assert (where["device"], where["compute_sanitizer"]) == ("H100", "2025.3.1.0")
    assert str(tmp_path) not in out.read_text()
    assert "memcheck   0 errors in 3 cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"racecheck all": (1, CASES, 86)}, "racecheck: 1 errors"),
        ({"initcheck all": (0, 2, 1)}, "initcheck: 2 of 3 cases, exit status 1"),
        ({"memcheck short-output": (0, 0, 0)}, "was planted, and it reports no error"),
        ({"synccheck barrier": (0, 0, 0)}, "was planted, and it reports no error"),
    ],
)
def test_anything_else_fails_and_is_written(fake, tmp_path, capsys, changes, message):
    out = tmp_path / "out.json"
    assert sanitize(fake(changes), out) == 1
    assert message in json.loads(out.read_text())["wrong"][0]
    printed = capsys.readouterr().out
    assert message in printed
    assert "found it" in printed  # the tool's own words


def test_without_a_compiler_the_planted_kernels_are_said_not_to_have_run(
    fake, tmp_path, monkeypatch
):
    monkeypatch.setattr(sanitize_kernels, "compile_planted", lambda _: (None, "no nvcc"))
    assert sanitize(fake(), tmp_path / "out.json") == 0
    controls = json.loads((tmp_path / "out.json").read_text())["controls"]
    assert controls["racecheck"]["not_run"] == "no nvcc"
    assert controls["memcheck"]["errors"] == 5


def test_a_tool_that_hangs_is_ended(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\nsleep 600 & wait\n")
    tool.chmod(0o755)
    hung = sanitize_kernels.run_tool(tool, "memcheck", ["all"], tmp_path, 0.5)
    assert hung.exit_status is None
    assert hung.seconds < 60


def test_the_sanitizer_is_looked_for_beside_nvcc(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="compute-sanitizer: not found"):
        sanitize_kernels.find_sanitizer(None)
    toolkit = tmp_path / "cuda" / "bin"
    toolkit.mkdir(parents=True)
    for name in ("nvcc", "compute-sanitizer"):
        (toolkit / name).touch(mode=0o755)
    (tmp_path / "nvcc").symlink_to(toolkit / "nvcc")
    assert sanitize_kernels.find_sanitizer(None) == toolkit / "compute-sanitizer"


def test_without_nvcc_nothing_is_compiled(tmp_path, monkeypatch):
    def missing():
        raise ToolMissing("there is no nvcc")

    monkeypatch.setattr(sanitize_kernels.toolchain, "find_nvcc", missing)
    assert sanitize_kernels.compile_planted(tmp_path) == (None, "kernels: there is no nvcc")


# ------------------------------------------------------------------------------- the driver


def moe_on_the_cpu(hidden, ids, weights, w13, s13, w2, s2, swiglu_limit):
    experts = reference.Experts(
        tiled.untile_weight(w13, True), tiled.untile_scale(s13, True), tiled.untile_weight(w2),
        tiled.untile_scale(s2),
    )  # fmt: skip
    return reference.moe(hidden.double(), experts, ids, weights, swiglu_limit).bfloat16()


def gemm_on_the_cpu(a, weight, scale):
    stored = tiled.untile_weight(weight), tiled.untile_scale(scale)
    return reference.gemm(a.double(), *stored).bfloat16()


def silu_on_the_cpu(gate_up, swiglu_limit):
    return reference.silu_interleaved(gate_up, swiglu_limit)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The driver with operators of PyTorch on the host."""
    small = tuple(case for case in sanitize_driver.MOE if case.hidden_size < 4096)
    monkeypatch.setattr(sanitize_driver, "MOE", small)
    monkeypatch.setattr(sanitize_driver, "to_device", lambda tensors: tensors)
    for name, function in (
        ("moe_w4a16", moe_on_the_cpu),
        ("gemm_w4a16", gemm_on_the_cpu),
        ("silu_interleaved", silu_on_the_cpu),
    ):
        monkeypatch.setattr(sanitize_driver.ops, name, function)
    return monkeypatch


def test_each_case_calls_an_operator_with_its_arguments_and_compares(on_the_cpu, capsys):
    assert sanitize_driver.run_all() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == sanitize_driver.NUM_CASES - 2
    assert all(0 < line["error"] < 0.01 for line in lines)
    assert len({line["case"] for line in lines}) == len(lines)


def test_a_wrong_result_is_counted(on_the_cpu):
    on_the_cpu.setattr(sanitize_driver.ops, "gemm_w4a16", lambda *a: gemm_on_the_cpu(*a) * 1.05)
    on_the_cpu.setattr(
        sanitize_driver.ops, "silu_interleaved", lambda *a, **k: torch.full((1, 1), torch.nan)
    )
    wrong = len(sanitize_driver.GEMM) + len(sanitize_driver.SILU)
    assert sanitize_driver.run_all() == wrong


def test_routes_hold_what_is_legal_and_rare():
    g = torch.Generator().manual_seed(0)
    ids, weights = sanitize_driver.routes(g, sanitize_driver.MoeCase(8))
    assert int(ids.min()) == -1
    assert int(ids.max()) == 8  # outside: there are 8 experts
    assert ids[2].tolist() == [0, 0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(8))


def test_with_a_caching_allocator_nothing_runs(monkeypatch):
    monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
    with pytest.raises(RuntimeError, match="cache would hide overruns"):
        sanitize_driver.main(["all"])
