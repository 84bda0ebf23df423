"""`bench compare` on hand-made results."""

import json

import pytest

from bench.load import compare, result
from bench.load.cli import main
from bench.load.errors import LoadError
from tests.bench.load.results import make_result


@pytest.fixture
def write(tmp_path):
    def write(name: str, made: dict) -> str:
        path = tmp_path / name
        result.write(path, made)
        return str(path)

    return write


def test_a_result_compared_with_itself_is_exit_status_0(write, capsys):
    path = write("a.json", make_result())
    assert main(["compare", path, path]) == 0
    assert "regressed" not in capsys.readouterr().out


@pytest.mark.parametrize(("slower", "status"), [(1.02, 0), (1.05, 1), (0.5, 0)])
def test_only_a_regression_beyond_the_bound_is_exit_status_1(write, capsys, slower, status):
    base, head = write("a.json", make_result()), write("b.json", make_result(slower))
    assert main(["compare", base, head, "--max-regression", "3%"]) == status
    printed = capsys.readouterr()
    assert ("ttft_ms at 991 x 1 by 5.0%" in printed.err) == bool(status)
    assert "| 991 x 2 | tpot_ms |" in printed.out


def test_the_bound_is_given_as_share_or_percent(write):
    base, head = write("a.json", make_result()), write("b.json", make_result(1.05))
    assert main(["compare", base, head, "--max-regression", "0.1"]) == 0
    assert main(["compare", base, head, "--max-regression", "10%"]) == 0


def test_noise_alone_is_no_regression():
    base = make_result(noise=(1.0, 1.3, 0.8, 1.2, 0.9, 1.1))
    head = make_result(noise=(1.2, 0.9, 1.15, 0.95, 1.3, 0.98))
    changes = compare.compare(base, head, 0.0)
    assert any(c.worse_by > 0 for c in changes)
    assert not any(c.regressed for c in changes)


def test_pairs_make_a_small_change_visible_in_large_noise():
    noise = (1.0, 1.3, 0.8, 1.2, 0.9, 1.1)
    changes = compare.compare(make_result(noise=noise), make_result(1.05, noise=noise), 0.03)
    assert {c.figure for c in changes if c.regressed} == {"ttft_ms", "tpot_ms", "output_throughput"}


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"mode": "warm"}, "mode is cold in one and warm in the other"),
        ({"seed": 3}, "seed is 0 in one and 3"),
        ({"streams": (1,)}, r"\(context, depth, streams\).*in one result only"),
        ({"noise": (1.0, 1.0, 1.0, 1.0)}, "4 repeats; at least 5"),
        ({"speculation": "on"}, "head is not to be believed: .*no acceptance metrics"),
    ],
)
def test_what_cannot_be_compared_is_refused(head, message):
    with pytest.raises(LoadError, match=message):
        compare.compare(make_result(), make_result(**head), 0.03)


def test_a_file_that_is_no_result_is_exit_status_2(write, tmp_path, capsys):
    good = write("a.json", make_result())
    other = tmp_path / "b.json"
    for content, line in [
        ("{", "not JSON"),
        ("[]", "not a result of `bench run`"),
        (json.dumps(make_result() | {"schema_version": 2}), "schema version 2"),
        (json.dumps(make_result() | {"cells": 3}), "cells: 3 is not of type 'array'"),
    ]:
        other.write_text(content)
        assert main(["compare", good, str(other)]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert line in said[0]
    assert main(["compare", good, str(tmp_path / "absent.json")]) == 2


def test_another_machine_is_pointed_out(write, capsys):
    other = make_result()
    other["provenance"]["device"] = "another CPU"
    assert main(["compare", write("a.json", make_result()), write("b.json", other)]) == 0
    assert "note: device differs" in capsys.readouterr().out


def test_a_loss_that_the_repeats_do_not_show_is_said(write, capsys):
    base = write("a.json", make_result(noise=(1.0, 1.01, 0.99, 1.0, 2.0)))
    head = write("b.json", make_result(1.3, noise=(1.0, 1.01, 0.99, 1.0, 1.0)))
    assert main(["compare", base, head]) == 0
    said = capsys.readouterr().out
    assert said.count("| worse, not shown |") == 6  # three figures of two cells
    assert "note: worse by more than 3.0%, not shown: ttft_ms at 991 x 1 by 30.0%" in said
    assert "more repeats would tell" in said


def test_what_is_worse_within_the_bound_is_no_loss(write, capsys):
    base = write("a.json", make_result(noise=(1.0, 1.01, 0.99, 1.0, 2.0)))
    head = write("b.json", make_result(1.3, noise=(1.0, 1.01, 0.99, 1.0, 1.0)))
    assert main(["compare", base, head, "--max-regression", "50%"]) == 0
    assert "not shown" not in capsys.readouterr().out


def test_what_else_differs_is_named_with_both_values(write, capsys):
    other = make_result(mtp=True)
    other["server"] |= {
        "model": "m", "window": 8192, "checkpoint": "c", "cache": {"cache_dtype": "fp8"},
    }  # fmt: skip
    other["provenance"]["commit"] = "d" * 40
    assert main(["compare", write("a.json", make_result()), write("b.json", other)]) == 0
    said = capsys.readouterr().out
    for line in (
        "model differs: fake in base, m in head",
        "window differs: 4096 in base, 8192 in head",
        "checkpoint differs: None in base, c in head",
        "cache cache_dtype differs: None in base, fp8 in head",
        "num_speculative_tokens differs: 0 in base, 1 in head",
        "commit differs: cccccccccccc in base, dddddddddddd in head",
    ):
        assert f"note: {line}\n" in said


def test_medians_are_of_the_repeats_that_are_compared():
    base = make_result(noise=(1.0, 1.0, 1.0, 1.0, 1.0))
    head = make_result(noise=(1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0))
    for change in compare.compare(base, head, 0.03):
        assert change.head / change.base == pytest.approx(change.ratio.value)
