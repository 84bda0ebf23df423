"""What the GPU run's driver concludes from its results; the run itself needs a GPU."""

from __future__ import annotations

import json
import time
from importlib.metadata import distributions
from types import SimpleNamespace

import pytest

from scripts import gpu_check
from scripts.gpu_case import CASES, accepted, wait_for
from scripts.gpu_check import cpu_problems, judge, main, noise, parity_problems, report
from tests.serve.front_process import is_running, wait_until

KINDS = {
    "window/layer": {"calls": 2, "us_per_call": 10.0},
    "mtp/attn": {"calls": 1, "us_per_call": 3.0},
}


def text(tokens: list[int], gaps: list[float]) -> dict:
    return {"tokens": tokens, "gaps": gaps}


def result(tokens: list[int], k: int = 0, **changes) -> dict:
    """A sound case with one prompt."""
    texts = [text(tokens, [5.0, 0.02, 5.0])]
    load = {"target": {}, "draft": {}} if k else {"target": {}}
    speculation = {"num_accepted_tokens": 9, "acceptance_rate": 0.9} if k else None
    row = {"output_throughput": 100.0, "tpot_ms": 10.0}
    return {
        "error": None,
        "start_s": 60.0,
        "prompt_tokens": [128],
        "together": texts,
        "alone": [text([1, 2, 3], [5.0, 0.05, 5.0])],
        "streams": {str(streams): row for streams in (1, 2, 4, 8)},
        "long": {"prompt_tokens": 65_536, "seconds_first_token": 7.0},
        "load": load,
        "speculation": speculation,
        **changes,
    }


PLAIN = result([1, 2, 3])


def test_the_noise_is_how_far_the_gap_moves_between_two_batch_shapes():
    assert noise(PLAIN) == pytest.approx(0.03)


def test_the_noise_ends_where_the_texts_part():
    plain = result([1, 2, 3], alone=[text([1, 9, 3], [5.0, 0.03, 99.0])])
    assert noise(plain) == pytest.approx(0.01)


def test_texts_may_part_where_the_two_best_tokens_were_within_the_noise():
    assert parity_problems(PLAIN, result([1, 9, 9])) == []
    assert parity_problems(PLAIN, result([9, 2, 3])) == [
        "prompt of 128 tokens parts at 0: gap 5.0000, noise 0.0300"
    ]


def test_sound_results_have_no_problem():
    assert judge({"graphs-k0": PLAIN, "graphs-k1": result([1, 2, 3], k=1)}) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"error": "ValueError: load of the target: 1 missing"}, "graphs-k1: ValueError: load of"),
        ({"together": [text([7, 2, 3], [5.0] * 3)]}, "graphs-k1: prompt of 128 tokens parts at 0"),
        ({"load": {"target": {}}}, "graphs-k1: no load record of draft"),
        ({"speculation": {"num_accepted_tokens": 0}}, "graphs-k1: no draft token was accepted"),
        ({"long": {"prompt_tokens": 10}}, "graphs-k1: the long prompt had 10 tokens"),
    ],
)
def test_each_thing_that_is_wrong_is_named(changes, problem):
    [found] = judge({"graphs-k0": PLAIN, "graphs-k1": result([1, 2, 3], k=1, **changes)})
    assert found.startswith(problem)


def test_without_the_plain_case_there_is_nothing_to_compare_with():
    [found] = judge({"graphs-k2": result([1, 2, 3], k=2)})
    assert found == "graphs-k2: nothing to compare with; run graphs-k0"


def routed(kernel: str) -> dict:
    module = {"module": "model.layers.*.ffn.experts.routed_experts", "kernel": kernel}
    return {"modules": [module, {"module": "lm_head", "kernel": ""}]}


def test_a_case_with_our_experts_has_them_in_target_and_head():
    ours, marlin = routed("Dsv4MaxqExperts"), routed("MarlinExperts")
    load = {"schema_version": 2, "target": ours}
    results = {"graphs-k0": PLAIN, "ours-k0": result([1, 2, 3], load=load)}
    assert judge(results) == []
    results["ours-k1"] = result([1, 2, 3], k=1, load={"target": ours, "draft": marlin})
    assert judge(results) == [
        "ours-k1: experts of the draft: MarlinExperts; Dsv4MaxqExperts were asked for"
    ]
    results["ours-k1"]["load"]["draft"] = {}
    assert judge(results) == ["ours-k1: experts of the draft: none; Dsv4MaxqExperts were asked for"]


def test_texts_of_our_experts_are_compared_with_marlins():
    ours = {"target": routed("Dsv4MaxqExperts")}
    other = result([9, 2, 3], load=ours)
    assert judge({"graphs-k0": PLAIN, "ours-k0": other}) == [
        "ours-k0: prompt of 128 tokens parts at 0: gap 5.0000, noise 0.0300"
    ]


def test_the_report_compares_a_decode_step_with_and_without_our_experts():
    def case(tpot_ms: float, us: dict[str, float]) -> dict:
        streams = {"1": {"output_throughput": 100.0, "tpot_ms": tpot_ms}}
        profile = {"kinds": {}, "steps": 5, "us_in_graphs": us}
        profile["us_spanned_by_graphs"] = 0.9 * sum(us.values())
        return result([1, 2, 3], streams=streams, profile=profile)

    results = {
        "graphs-k0": case(10.0, {"attend": 50.0, "Marlin|w13": 500.0, "sum": 5.0}),
        "ours-k0": case(8.0, {"attend": 52.5, "decode_up": 300.0}),
    }
    lines = report(results).splitlines()
    start = lines.index("| a decode step | graphs-k0 | ours-k0 | less |")
    assert lines[start + 2 :] == [
        "| TPOT at 1 stream, ms | 10.00 | 8.00 | 2.00 |",
        "| decode step's graphs, from first to last kernel, us | 99.90 | 63.45 | 36.45 |",
        "| decode step's graphs, sum over kernels, us | 111.00 | 70.50 | 40.50 |",
        "| `Marlin w13`, us | 100.00 | 0.00 | 100.00 |",
        "| `decode_up`, us | 0.00 | 60.00 | -60.00 |",
        "| `sum`, us | 1.00 | 0.00 | 1.00 |",
        "| `attend`, us | 10.00 | 10.50 | -0.50 |",
    ]
    del results["graphs-k0"]
    assert "a decode step |" not in report(results)


def test_acceptance_is_the_difference_of_two_readings():
    before = {"num_drafts": 10, "num_draft_tokens": 20, "num_accepted_tokens": 5}
    after = {"num_drafts": 20, "num_draft_tokens": 40, "num_accepted_tokens": 15}
    found = accepted(before, after)
    assert found["acceptance_rate"] == 0.5
    assert found["acceptance_length"] == 2.0
    assert accepted(before, before)["acceptance_rate"] is None


def test_the_report_has_a_row_for_each_case_and_a_table_for_each_profile():
    results = {
        "graphs-k0": PLAIN,
        "eager-k1": result([1, 2, 3], k=1, profile={"kinds": KINDS}),
        "tiny-k0": {"error": "RuntimeError: no kernel\nmore"},
    }
    lines = report(results).splitlines()
    assert "| graphs-k0 | 60 | - | 100, 100, 100, 100 | 10.00 | 7.0 s |" in lines
    assert "| tiny-k0 | RuntimeError: no kernel | | | | |" in lines
    assert "| window | 10.0 | - | - |" in lines
    assert "| mtp | - | 3.0 | - |" in lines


def test_a_case_that_ends_without_a_result_is_a_failed_case(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "CASE_SCRIPT", tmp_path / "absent.py")
    arguments = ["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["run", *arguments, "--cases", "graphs-k0"]) == 1
    body = json.loads((tmp_path / "out" / "graphs-k0.json").read_text())
    assert body["error"] == "ended with status 2 and no result"
    assert main(["report", "--out", str(tmp_path / "out")]) == 1
    assert "graphs-k0: ended with status 2" in capsys.readouterr().err


def test_what_a_case_had_measured_outlives_it(tmp_path, monkeypatch):
    script = tmp_path / "case.py"
    script.write_text(
        "import pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        '(out / \'graphs-k0.partial\').write_text(\'{"case": "graphs-k0", "start_s": 7}\')\n'
        "raise SystemExit(9)\n"
    )
    monkeypatch.setattr(gpu_check, "CASE_SCRIPT", script)
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(tmp_path), "--out", str(out), "--cases", "graphs-k0"]
    assert main(["run", *arguments]) == 1
    body = json.loads((out / "graphs-k0.json").read_text())
    assert body == {"case": "graphs-k0", "start_s": 7, "error": "ended with status 9 and no result"}


def test_a_case_whose_time_is_over_takes_its_ranks_with_it(tmp_path, monkeypatch):
    script = tmp_path / "case.py"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'rank')!r}).write_text(str(rank.pid))\n"
        "time.sleep(600)\n"
    )
    pid = tmp_path / "rank"

    def now_s() -> float:
        """An hour passes when the rank runs."""
        return time.monotonic() + 3600 * (pid.exists() and pid.read_text() != "")

    monkeypatch.setattr(gpu_check, "CASE_SCRIPT", script)
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=now_s, sleep=time.sleep))
    arguments = ["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out"), "--timeout", "60"]
    assert main(["run", *arguments, "--cases", "graphs-k0"]) == 1
    rank = int(pid.read_text())
    wait_until(lambda: not is_running(rank), "the rank ends")


def test_a_case_beside_one_that_ended_waits_no_longer(tmp_path):
    (tmp_path / "tiny-k0.json").write_text("{}")
    (tmp_path / "graphs-k0.ready").touch()
    wait_for(["tiny-k0", "graphs-k0"], tmp_path)


@pytest.mark.parametrize(("rate", "count"), [(0.68, 0), (0.6, 1)])
def test_acceptance_is_compared_with_the_cpu(rate, count):
    def tiny(value: float) -> dict:
        return {"tiny-k1": {"heldout": {"speculation": {"acceptance_rate": value}}}}

    assert len(cpu_problems(tiny(0.67), tiny(rate))) == count
    assert cpu_problems({}, tiny(rate)) == ["tiny-k1: no result of the CPU"]


def test_an_unknown_case_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--checkpoint", "x", "--out", "y", "--cases", "graphs-k0,nope"])
    assert f"'nope'; there are {', '.join(CASES)}" in capsys.readouterr().err


def test_prepare_makes_the_plugin_an_entry_point(tmp_path, capsys):
    assert main(["prepare", "--plugin", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("export PYTHONPATH=")
    [found] = distributions(path=[str(tmp_path)])
    [entry] = found.entry_points.select(group="vllm.general_plugins")
    assert (entry.name, entry.value) == ("dsv4_maxq", "kernels.plugin:register")
