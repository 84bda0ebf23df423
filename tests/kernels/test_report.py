"""What the report says of kernels with known figures, and what it fails on."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from kernels import report
from kernels.dry_run import Launch
from kernels.inspection import Kernel, problems_of
from kernels.resources import Compiled, Sass

ARCHS = ("sm_90", "sm_120a")
PROVENANCE = {"nvcc": "13.0.88", "architectures": ARCHS}


def launch(number=0, case="moe M=1 TP2", blocks=376, shared=45000) -> Launch:
    return Launch(number, case, "mangled", (blocks // 4, 4, 1), 256, shared, True)


@pytest.fixture
def good() -> Kernel:
    """A kernel as it should be, two of whose blocks fit on a multiprocessor."""
    return Kernel(
        name="up<1>",
        compiled={arch: Compiled(128, 0, 0, 0, 3000) for arch in ARCHS},
        sass=Sass(
            instructions=1000,
            mma=64,
            global_loads=Counter({128: 20, 32: 2}),
            streaming_loads=Counter({128: 20}),
        ),
        launches={arch: [launch()] for arch in ARCHS},
    )


def compiled(kernel: Kernel, **changes: int) -> Kernel:
    return replace(
        kernel, compiled={**kernel.compiled, "sm_90": Compiled(128, *{**ZERO, **changes}.values())}
    )


ZERO = {"stack_bytes": 0, "spill_store_bytes": 0, "spill_load_bytes": 0, "static_shared_bytes": 0}


def test_a_kernel_as_it_should_be_has_no_problems(good):
    assert problems_of(good) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"spill_store_bytes": 12}, "sm_90: spills 12 bytes and loads 0 back; none may be"),
        ({"spill_load_bytes": 8}, "sm_90: spills 0 bytes and loads 8 back; none may be"),
        ({"stack_bytes": 16}, "sm_90: has a stack frame of 16 bytes; none may be"),
        ({"static_shared_bytes": 200_000}, "sm_90: H100 SXM cannot run it: shared memory"),
    ],
)
def test_what_ptxas_must_not_say_is_a_problem(good, changes, line):
    assert problems_of(compiled(good, **changes)) == [f"up<1>, {line}"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"local_loads": 1}, "1 instructions on local memory; none may be"),
        ({"local_stores": 2}, "2 instructions on local memory; none may be"),
        (
            {"streaming_loads": Counter({128: 20, 64: 3})},
            "3 streaming loads are not of 16 bytes",
        ),
        (
            {"streaming_loads": Counter()},
            "multiplies matrices, but streams no weights 16 bytes at a time",
        ),
    ],
)
def test_what_the_code_must_not_hold_is_a_problem(good, changes, line):
    kernel = replace(good, sass=replace(good.sass, **changes))
    assert problems_of(kernel) == [f"up<1>, sm_120a: {line}"]


def test_a_kernel_without_matrices_may_stream_nothing(good):
    kernel = replace(good, sass=Sass(instructions=10, global_loads=Counter({32: 4})))
    assert problems_of(kernel) == []


def test_occupancy_is_that_of_the_launch_with_the_most_shared_memory(good):
    assert good.occupancy("sm_120a").blocks == 2
    both = replace(good, launches={"sm_120a": [launch(), launch(shared=60_000)]})
    assert both.occupancy("sm_120a").blocks == 1


def test_waves_are_grids_over_what_all_multiprocessors_hold(good):
    assert good.waves(launch(blocks=376), "sm_120a") == 1.0
    assert good.waves(launch(blocks=188), "sm_120a") == 0.5
    assert good.waves(launch(blocks=264), "sm_90") == 1.0


def test_a_kernel_that_is_not_launched_has_no_occupancy(good):
    idle = replace(good, launches={arch: [] for arch in ARCHS})
    assert idle.occupancy("sm_120a") is None
    assert problems_of(idle) == []
    assert "not launched" in report.table([idle], PROVENANCE)


def test_the_table_shows_a_kernel_in_a_line_and_launches_in_their_order(good):
    other = replace(good, name="down<1>", launches={"sm_120a": [launch(1)], "sm_90": []})
    text = report.table([other, good], PROVENANCE)
    [line] = [line for line in text.splitlines() if line.startswith("up<1>")]
    cells = "up<1> 128/128 0 0 3000+45000 256 2 16/48 registers 20/20 20/22 64 0"
    assert " ".join(line.split()) == cells
    [case] = [line for line in text.splitlines() if line.startswith("moe M=1 TP2")]
    assert case.split("  ")[-2:] == ["up<1> 376 (1.00)", "down<1> 376 (1.00)"]


@pytest.mark.parametrize(("spilled", "status"), [(0, 0), (4, 1)])
def test_the_command_writes_json_and_fails_on_a_problem(
    good, tmp_path, monkeypatch, capsys, spilled, status
):
    kernel = compiled(good, spill_store_bytes=spilled)
    monkeypatch.setattr(report, "inspect", lambda folder: ([kernel], PROVENANCE))
    out = tmp_path / "report.json"
    assert report.main(["--out", str(out)]) == status
    written = json.loads(out.read_text())
    assert len(written["problems"]) == status
    assert ("PROBLEM up<1>, sm_90: spills" in capsys.readouterr().out) == bool(status)
    [of_kernel] = written["kernels"]
    assert of_kernel["by_architecture"]["sm_120a"]["occupancy"]["blocks"] == 2
    assert of_kernel["by_architecture"]["sm_120a"]["launches"][0]["waves"] == 1.0
    assert of_kernel["sass_sm_120a"]["global_loads_by_bits"] == {"32": 2, "128": 20}


def test_without_a_library_the_command_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DSV4_KERNELS_DIR", str(tmp_path))
    assert report.main([]) == 1
    assert "is not built; run `make kernels`" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
