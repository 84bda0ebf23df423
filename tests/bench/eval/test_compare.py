"""Base against candidate: on the same items, by what each got right alone."""

import json

import pytest

from bench.eval import compare, stats
from bench.eval.cli import main
from bench.load.errors import LoadError

DATA = {"source": "file own.jsonl", "licence": "own", "sha256": "ab" * 32}


def task(verdicts: str, items_sha256: str = "same", data: dict = DATA, problems=(), start=0):
    """A task's entry; of the verdicts `+` is right, `-` wrong, `t` truncated, `i` invalid."""
    names = {"+": "correct", "-": "wrong", "t": "truncated", "i": "invalid"}
    items = [[f"item-{i}", names[v]] for i, v in enumerate(verdicts, start)]
    return {"task": "mini-math", "n": len(items), "items": items, "items_sha256": items_sha256,
            "data": data, "problems": list(problems)}  # fmt: skip


def result(*tasks: dict, **config) -> dict:
    settings = {"reasoning": "off", "temperature": 0.0, "max_tokens": None, "streams": 2, "seed": 0}
    return {"tasks": list(tasks), "config": settings | config, "server": {"version": "0.32.0"}}


def paired(base: dict, head: dict) -> compare.Paired:
    (found,) = compare.compare(result(base), result(head))
    return found


def test_items_are_paired_by_name_and_counted_both_ways():
    found = paired(task("++++----+t"), task("+--++---++"))
    assert (found.n, found.lost, found.gained) == (10, 2, 2)
    assert (found.base, found.head) == (0.5, 0.5)
    assert found.p == 1.0
    assert found.verdict == "no loss shown"


def test_the_order_of_items_does_not_matter():
    base, head = task("+-+-+-"), task("++++--")
    shuffled = head | {"items": head["items"][::-1]}
    assert paired(base, shuffled) == paired(base, head)


def test_a_loss_is_called_one_where_chance_is_below_five_per_cent():
    five = paired(task("+" * 20), task("-" * 5 + "+" * 15))
    assert five.p == pytest.approx(2 / 2**5)  # 0.0625
    assert (five.is_loss, five.verdict) == (False, "no loss shown")
    six = paired(task("+" * 20), task("-" * 6 + "+" * 14))
    assert six.p == pytest.approx(2 / 2**6)  # 0.03125
    assert (six.is_loss, six.verdict) == (True, "LOSS")
    other_way = paired(task("-" * 6 + "+" * 14), task("+" * 20))
    assert (other_way.is_loss, other_way.verdict) == (False, "gain")


def test_the_same_scores_differ_where_other_items_are_right():
    """The pairs decide, not the two shares: 10 lost and 8 gained are no loss of 2 of 100."""
    base = task("+" * 50 + "-" * 50)
    churned = paired(base, task("-" * 10 + "+" * 40 + "+" * 8 + "-" * 42))
    assert churned.p > 0.5
    assert churned.base - churned.head == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("base", "head", "verdict", "told"),
    [
        ("+" * 100, "t" * 3 + "i" * 3 + "+" * 94, "LOSS",
         "LOSS (no loss shown without 6 unanswered)"),
        ("+" * 94 + "t" * 6, "-" * 6 + "+" * 94, "no loss shown",
         "no loss shown (LOSS without 6 unanswered)"),
        ("+" * 100, "t" + "-" * 6 + "+" * 93, "LOSS", "LOSS"),
    ],
    ids=["a loss", "a loss that is hidden", "no other verdict"],
)  # fmt: skip
def test_a_verdict_that_hangs_on_unanswered_items_is_named(base, head, verdict, told):
    """They count as not right; that there was no answer may be the harness's doing."""
    found = paired(task(base), task(head))
    assert (found.verdict, found.told) == (verdict, told)
    assert told in compare.render([found], {})
    assert found.to_json()["answered_verdict"] in (
        told,
        told.partition(" (")[2].split(" without")[0],
    )


def test_what_it_cannot_see_follows_from_the_items_and_their_churn():
    calm = paired(task("+" * 100), task("+" * 100))
    assert calm.churn == compare.LEAST_CHURN
    assert calm.detectable_loss == stats.detectable_loss(100, compare.LEAST_CHURN)
    base = task("+" * 50 + "-" * 50)
    restless = paired(base, task("-" * 10 + "+" * 50 + "-" * 40))
    assert restless.churn == 0.1
    assert restless.detectable_loss > calm.detectable_loss
    assert paired(task("+" * 5), task("+" * 5)).detectable_loss is None


def test_a_quick_run_is_compared_with_its_part_of_a_full_one():
    found = paired(task("+-+-"), task("++", items_sha256="other"))
    assert (found.n, found.lost, found.gained) == (2, 0, 1)
    assert found.base == 0.5


@pytest.mark.parametrize(
    "head",
    [
        task("+-+-", items_sha256="other", data=DATA | {"sha256": "cd" * 32}),
        task("+-+-", items_sha256="other", start=2),
        task("+-+-", items_sha256="other", start=4),
    ],
    ids=["other data", "half in common", "none in common"],
)
def test_other_items_are_refused(head):
    with pytest.raises(LoadError, match="mini-math: the items are not the same: .* in common of 4"):
        paired(task("+-+-"), head)


def test_a_part_of_data_without_a_hash_may_be_of_other_data():
    unknown = DATA | {"sha256": None}
    with pytest.raises(LoadError, match="the items are not the same"):
        paired(task("+-+-", data=unknown), task("+-", items_sha256="other", data=unknown))


def test_results_without_a_common_task_are_refused():
    with pytest.raises(LoadError, match="the results share no task"):
        compare.compare(result(task("+")), result(task("+") | {"task": "mmlu"}))


BOTH, ONE = [task("+"), task("+") | {"task": "mmlu"}], [task("+")]


@pytest.mark.parametrize(
    ("base", "head", "chosen", "missing"),
    [
        (BOTH, ONE, (), {"mmlu": "only in the base"}),
        (ONE, BOTH, (), {}),
        (BOTH, ONE, ("mini-math",), {}),
        (BOTH, ONE, ("mini-math", "mmlu"), {"mmlu": "only in the base"}),
        (ONE, BOTH, ("mini-math", "mmlu"), {"mmlu": "not in the base"}),
    ],
)
def test_a_task_that_is_missing_is_named_unless_the_tasks_were_chosen_so(
    tmp_path, capsys, monkeypatch, base, head, chosen, missing
):
    arguments = ["--tasks", ",".join(chosen)] if chosen else []
    status, out, err = compared(tmp_path, capsys, monkeypatch, result(*base), result(*head),
                                *arguments)  # fmt: skip
    assert status == (1 if missing else 0)
    for name, where in missing.items():
        (row,) = [line for line in out.splitlines() if name in line]
        assert where in row
        assert f"not compared: {name} is {where}" in err
    assert out.count("mmlu") == len(missing)
    status, out, _ = compared(tmp_path, capsys, monkeypatch, result(*base), result(*head),
                              *arguments, "--json")  # fmt: skip
    assert status == (1 if missing else 0)
    told = {entry["task"]: entry["verdict"] for entry in json.loads(out)}
    assert told == {"mini-math": "no loss shown"} | missing


def test_of_chosen_tasks_only_these_are_compared():
    base, head = result(*BOTH), result(*BOTH)
    assert [pair.task for pair in compare.compare(base, head, ("mmlu",))] == ["mmlu"]


def compared(tmp_path, capsys, monkeypatch, base: dict, head: dict, *arguments):
    """Exit status, stdout and stderr of the command."""
    paths = [tmp_path / "base.json", tmp_path / "head.json"]
    for path, one in zip(paths, (base, head), strict=True):
        path.write_text(json.dumps(one))
    # What of a result is read here has no need of the rest of its schema.
    monkeypatch.setattr("bench.eval.result.read", lambda path: json.loads(path.read_text()))
    status = main(["compare", *map(str, paths), *arguments])
    return status, *capsys.readouterr()


def test_what_differs_between_the_runs_is_named():
    head = result(task("+"), reasoning="on", streams=8)
    head["server"] = {"version": "0.33.0"}
    assert compare.notes(result(task("+")), head) == [
        "reasoning: base off, candidate on", "streams: base 2, candidate 8",
        "vLLM: base 0.32.0, candidate 0.33.0",
    ]  # fmt: skip
    assert compare.notes(head, head) == []


@pytest.mark.parametrize(
    ("head", "status", "says"),
    [
        (task("+" * 20), 0, ""),
        (task("-" * 6 + "+" * 14), 1, "accuracy was lost: mini-math by 30.0 points"),
        (task("-" * 5 + "+" * 15), 0, ""),
        (task("t" * 6 + "+" * 14, problems=["30.0% truncated"]), 1, "not valid: mini-math"),
    ],
    ids=["same", "lost", "too few to tell", "not valid"],
)
def test_the_exit_status_says_whether_accuracy_was_lost(
    tmp_path, capsys, monkeypatch, head, status, says
):
    results = result(task("+" * 20)), result(head)
    found, out, err = compared(tmp_path, capsys, monkeypatch, *results)
    assert found == status
    assert "mini-math" in out
    assert says in err
    assert bool(err) == bool(status)
    found, out, _ = compared(tmp_path, capsys, monkeypatch, *results, "--json")
    assert found == status
    assert json.loads(out)[0]["n"] == 20
