"""A whole run on a device that is made up: what it refuses, what it writes."""

import json
import re
import shlex
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from bench.kernels import run as command
from bench.kernels.check import WrongAnswer
from bench.kernels.config import BenchConfig, parse_config
from bench.kernels.gpu import Unavailable
from bench.kernels.marlin import C_LIBRARY, MOE_LIBRARY
from bench.kernels.origin import REPOSITORY
from bench.kernels.report import plot, render
from bench.kernels.setup import MARLIN, MARLIN_OURS, Arms
from kernels.dispatch import FOLDER
from tests.bench.kernels.fakes import FakeArm, FakeGpu


def config(tmp_path, **changes) -> BenchConfig:
    sizes = {"hidden_size": 128, "inter_size": 128, "num_experts": 8, "top_k": 2}
    values = {"tokens": (1, 2, 4), "budget_s": 600.0, "breakdown": False, **sizes, **changes}
    return BenchConfig(**values)


def ours_us(tokens: int) -> float:
    return 10.0 * tokens


def marlin_us(tokens: int) -> float:
    return 18.0 * tokens if tokens < 4 else 9.0 * tokens


def make(spoil_ours=None, broken=None):
    def arms(_, gpu):
        return Arms(
            ours=FakeArm(gpu, "ours", ours_us, spoil=spoil_ours),
            baselines=(
                FakeArm(gpu, MARLIN, marlin_us, interleaved=False),
                FakeArm(gpu, MARLIN_OURS, lambda tokens: marlin_us(tokens) - 0.5),
            ),
            broken=(FakeArm(gpu, "broken", 1.0, spoil=broken or torch.zeros_like),),
            notes={MARLIN: "made up"},
        )

    return arms


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return command.run(config(tmp_path_factory.mktemp("run")), FakeGpu(), make())


def case(result, tokens, routing="uniform"):
    (entry,) = (e for e in result["cases"] if (e["tokens"], e["routing"]) == (tokens, routing))
    return entry


def test_every_size_is_measured_and_drafts_also_with_shared_experts(result):
    done = [(entry["tokens"], entry["routing"]) for entry in result["cases"]]
    assert done == [(1, "uniform"), (2, "uniform"), (4, "uniform"), (2, "mtp"), (4, "mtp")]


def test_times_ratios_and_rates_are_those_of_the_arms(result):
    entry = case(result, 2)
    assert entry["arms"]["ours"]["us"] == pytest.approx(20.0, rel=0.01)
    ratio = entry["ratios"]["marlin"]
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    assert ratio["ratio"] == pytest.approx(1.8, rel=0.01)
    num_bytes = entry["experts"] * (128 * 128 * 3 // 2 + 3 * 128 * 2) + 2 * (4 * 128 + 16)
    assert entry["bytes"] == num_bytes
    assert entry["arms"]["ours"]["gb_s"] == pytest.approx(num_bytes / 20.0 / 1000, rel=0.01)
    share = entry["arms"]["ours"]["gb_s"] / 100.0
    assert entry["arms"]["ours"]["share_of_copy"] == pytest.approx(share)


def test_experts_are_counted_over_the_steps_of_all_draws(result):
    entry = case(result, 4)
    counts = [count for draw in entry["draws"] for count in draw["experts"]]
    assert len(entry["draws"]) == 2
    assert entry["draws"][0]["seed"] != entry["draws"][1]["seed"]
    assert entry["experts"] == sum(counts) / len(counts)
    assert all(2 <= count <= 8 for count in counts)


def test_more_is_read_between_two_visits_of_a_layer_than_four_caches_hold(result):
    assert result["layers"]["rotation_bytes"] >= 4 * result["provenance"]["l2_bytes"]
    assert result["layers"]["rotation_bytes"] == case(result, 1)["rotation_bytes"]


def test_raw_rounds_are_kept_of_every_arm(result):
    arms = case(result, 1)["arms"]
    assert set(arms) == {"ours", "marlin", "marlin_interleaved", "again"}
    assert all(len(rounds) >= 10 for draw in arms.values() for rounds in draw["rounds_us"])


def test_every_arm_of_every_draw_was_checked_on_what_its_graph_wrote(result):
    checks = case(result, 2)["checks"]
    assert [check["arm"] for check in checks] == 2 * ["ours", "marlin", "marlin_interleaved"]
    assert all(check["accepted"] and check["tokens"] == 2 for check in checks)


def test_controls_were_refused(result):
    refused = result["controls"]["refused"]
    assert [control["arm"] for control in refused] == [
        "gate and up rows taken in halves", "one slot of one token left out", "broken",
    ]  # fmt: skip
    assert not any(control["accepted"] for control in refused)


def test_the_dispatcher_takes_marlin_where_ours_is_slower(result):
    assert result["dispatch"] == [
        {"max_tokens": 2, "kernel": "ours"},
        {"max_tokens": None, "kernel": "marlin"},
    ]
    assert case(result, 4)["serves"] == "marlin"
    assert case(result, 4)["dispatched_ratio"] == pytest.approx(36 / 35.5, rel=0.01)
    assert case(result, 2, "mtp")["dispatched_ratio"] == pytest.approx(1.8, rel=0.01)


def test_targets_say_what_was_reached(result):
    rows = {row["what"]: row for row in result["targets"]}
    assert rows["1.7 x Marlin at 1 tokens"]["met"]
    assert not rows["70% of copy bandwidth at 1 tokens"]["met"]
    assert rows["after dispatch never below 0.98 x Marlin"]["met"]
    assert "1.25 x Marlin at 3 tokens" not in rows


def test_targets_of_another_device_are_not_claimed(tmp_path):
    results = command.run(config(tmp_path, tokens=(1,)), FakeGpu(capability="12.0"), make())
    assert results["targets"] == []


def test_provenance_names_sources_and_device(result):
    where = result["provenance"]
    assert where["device"] == "Fake GPU"
    assert len(where["kernel_sources_sha256"]) == 64
    assert result["config"]["swiglu_limit"] == 10.0
    assert result["notes"]["humming"] == "not asked for (--humming)"


def test_the_table_has_a_row_per_case_and_fits_a_screen(result):
    lines = render(result).splitlines()
    header = next(i for i, text in enumerate(lines) if "x Marlin" in text)
    assert len(lines[header + 1 : lines.index("", header)]) == 5
    assert max(map(len, lines)) <= 160
    assert len(lines) <= 50
    assert any(re.match(r"target: 1.7 x Marlin at 1 tokens: 1\.(79|80|81), met$", x) for x in lines)


def test_the_plot_is_an_svg_with_a_point_per_case(result):
    root = ElementTree.fromstring(plot(result))
    names = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert names.count("circle") == 5
    assert names.count("polyline") == 2
    assert "Fake GPU" in plot(result)
    assert "http" not in plot(result).replace("http://www.w3.org/2000/svg", "")


def test_a_wrong_kernel_is_not_timed(tmp_path):
    with pytest.raises(WrongAnswer, match="ours: largest error"):
        command.run(config(tmp_path), FakeGpu(), make(spoil_ours=lambda out: 1.02 * out))


def test_a_kernel_that_leaves_a_token_unwritten_is_not_timed(tmp_path):
    def forget(out):
        if len(out) == 4:  # right in the controls, which have three tokens
            out[2, 5] = float("nan")
        return out

    with pytest.raises(WrongAnswer, match="ours: largest error nan"):
        command.run(config(tmp_path), FakeGpu(), make(spoil_ours=forget))


def test_a_control_that_passes_stops_the_run(tmp_path):
    with pytest.raises(WrongAnswer, match="control broken: accepted"):
        command.run(config(tmp_path), FakeGpu(), make(broken=lambda out: out))


def test_times_that_differ_for_the_same_kernel_are_refused(tmp_path):
    results = command.run(config(tmp_path, tokens=(1,)), FakeGpu(drift=1.1), make())
    with pytest.raises(WrongAnswer, match=r"at 1 tokens ours took 1\.\d+ times as long as itself"):
        command.require_again(results)


def test_ours_against_itself_is_one(result):
    assert set(result["controls"]["again"]) == {"1", "2", "4"}
    command.require_again(result)


def test_too_little_memory_for_cold_layers_is_said(tmp_path):
    gpu = FakeGpu()
    gpu.free_bytes = lambda: 1 << 20
    with pytest.raises(Unavailable, match="layers of .* GiB are needed"):
        command.run(config(tmp_path), gpu, make())


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """The command with a made-up device and arms."""
    small = config(tmp_path, tokens=(1, 2))
    monkeypatch.setattr(command, "Gpu", FakeGpu)
    monkeypatch.setattr(command, "make_arms", make())
    asked = {}

    def parse(argv):
        parsed = parse_config(argv)
        kept = {"out": parsed.out, "dispatch_table": parsed.dispatch_table}
        return BenchConfig(**{**vars(small), **kept, **asked})

    monkeypatch.setattr(command, "parse_config", parse)
    return monkeypatch


def test_the_command_writes_result_plot_and_table(installed, tmp_path, capsys):
    out, table = tmp_path / "results" / "a.json", tmp_path / "dispatch.json"
    assert command.main(["--out", str(out), "--dispatch-table", str(table)]) == 0
    assert json.loads(out.read_text())["schema_version"] == 1
    assert out.with_suffix(".svg").read_text().startswith("<svg")
    tables = json.loads(table.read_text())["tables"]
    assert tables[0]["segments"][0] == {"max_tokens": 2, "kernel": "ours"}
    printed = capsys.readouterr()
    assert "x Marlin" in printed.out
    assert "s left" in printed.err
    assert str(tmp_path) not in out.read_text()


def test_a_wrong_kernel_ends_with_1_and_writes_nothing(installed, tmp_path, capsys):
    installed.setattr(command, "make_arms", make(spoil_ours=torch.zeros_like))
    assert command.main(["--out", str(tmp_path / "a.json")]) == 1
    assert not (tmp_path / "a.json").exists()
    assert "largest error" in capsys.readouterr().err


def test_times_that_mean_nothing_give_no_dispatch_table(installed, tmp_path):
    installed.setattr(command, "Gpu", lambda: FakeGpu(drift=1.1))
    out, table = tmp_path / "a.json", tmp_path / "dispatch.json"
    assert command.main(["--out", str(out), "--dispatch-table", str(table)]) == 1
    assert out.exists()
    assert not table.exists()


def test_a_budget_that_is_spent_loses_nothing_and_gives_no_dispatch_table(
    installed, tmp_path, capsys
):
    installed.setattr(command, "OVERRUN_S", -1e9)
    out, table = tmp_path / "a.json", tmp_path / "dispatch.json"
    assert command.main(["--out", str(out), "--dispatch-table", str(table)]) == 1
    found = json.loads(out.read_text())
    assert [(e["tokens"], e["routing"]) for e in found["cases"]] == [(1, "uniform")]
    assert found["left_out"] == ["2 uniform", "2 mtp"]
    printed = capsys.readouterr()
    assert "left out, the budget was spent: 2 uniform, 2 mtp" in printed.out
    assert "dispatch.json: not written, for want of 2 uniform;" in printed.err
    assert not table.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "2,1"], "tokens = (2, 1)"),
        (["--tokens", "0"], "tokens = (0,)"),
        (["--tokens", "x"], "invalid"),
        (["--tp", "3"], "tp = 3"),
        (["--draws", "0"], "draws = 0"),
        (["--budget-s", "0"], "budget_s = 0.0"),
    ],
)
def test_a_bad_option_ends_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_config(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_tensor_parallelism_cuts_the_inner_size():
    assert [parse_config(["--tp", tp]).inter_size for tp in ("1", "2")] == [2048, 1024]


def test_humming_that_is_not_there_is_said_and_skipped(tmp_path):
    results = command.run(config(tmp_path, tokens=(1,), humming=True), FakeGpu(), make())
    assert results["notes"]["humming"].startswith("skipped: ")
    assert "humming" not in results["cases"][0]["arms"]


@pytest.mark.parametrize(("spoil", "timed"), [(None, True), (torch.zeros_like, False)])
def test_an_extra_arm_is_timed_if_it_is_right(tmp_path, monkeypatch, spoil, timed):
    gpu = FakeGpu()
    extra = FakeArm(gpu, "humming", 15.0, spoil=spoil)
    monkeypatch.setattr(command, "make_humming", lambda *_: (extra, "made up"))
    results = command.run(config(tmp_path, tokens=(1,)), gpu, make())
    (entry,) = results["cases"]
    assert ("humming" in entry["arms"]) is timed
    if timed:
        assert entry["ratios"]["humming"]["ratio"] == pytest.approx(1.5, rel=0.01)
    judged = [check["accepted"] for check in entry["checks"] if check["arm"] == "humming"]
    assert judged == 2 * [timed]


def test_a_profiler_that_sees_nothing_costs_the_breakdown_only(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("breakdown: 0 kernels in 5 steps")

    monkeypatch.setattr(command.breakdown, "profile", fails)
    kept = []
    settings = config(tmp_path, tokens=(1,), breakdown=True)
    results = command.run(settings, FakeGpu(), make(), keep=kept.append)
    assert kept == [results]
    assert results["breakdown"] == []
    assert results["notes"]["breakdown"] == "breakdown: 0 kernels in 5 steps"


def test_a_breakdown_is_of_ours_and_of_marlin(tmp_path, monkeypatch):
    launch = command.breakdown.Launch("decode_up", 10.0, 9.0)
    monkeypatch.setattr(command.breakdown, "profile", lambda *_: [launch])
    settings = config(tmp_path, tokens=(1, 3), breakdown=True)
    results = command.run(settings, FakeGpu(), make())
    assert [(e["tokens"], e["arm"]) for e in results["breakdown"]] == [(1, "ours"), (1, "marlin")]
    assert "ours, 1 tokens: decode_up 9.0 (10.0)" in render(results)


def test_the_command_in_the_documentation_is_one():
    text = (REPOSITORY / "docs" / "bench-kernels.md").read_text(encoding="utf-8")
    line = text.replace("\\\n", " ").partition("    python -m bench.kernels ")[2].splitlines()[0]
    parsed = parse_config(shlex.split(line))
    assert parsed.marlin.name == MOE_LIBRARY
    assert parsed.vllm_c.name == C_LIBRARY
    assert (REPOSITORY / parsed.dispatch_table).parent == FOLDER
