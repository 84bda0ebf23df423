"""`bench eval run` against a server whose every answer is known."""

import contextlib
import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest

from bench.eval import run as run_module
from bench.eval import sources
from bench.eval.config import EvalConfig, TaskName
from bench.load.errors import LoadError, ServerUnusable, Unbelievable
from tests.bench.eval.chat_server import ChatServer, Reply, serving

CONFIG = EvalConfig(tasks=(TaskName.MINI_MATH,), streams=3)
ROWS = sources.own("mini_math")[0]
ANSWERS = [row["answer"].rpartition("####")[2].strip() for row in ROWS]
WRONG = Reply("The answer is 987654.")
MALFORMED = Reply("I am thinking about it.")
HEDGED = Reply("The answer is 12 or 14.")
REFUSED = Reply("I'm sorry, but I can't help with that.")
TRUNCATED = Reply("The answer is 11. But let me", finish_reason="length")
THINKS_ONLY = Reply("", reasoning="The answer is 11.")


def right(number: str) -> Reply:
    return Reply(f"So.\nThe answer is {number}.", reasoning="It could be 3. No.")


def script(*others: Reply) -> ChatServer:
    """Right for all but the first items, which get these."""
    replies = {row["question"]: right(answer) for row, answer in zip(ROWS, ANSWERS, strict=True)}
    replies |= {row["question"]: reply for row, reply in zip(ROWS, others, strict=False)}
    return ChatServer(replies)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "eval.json"


def scored(server: ChatServer, output, config: EvalConfig = CONFIG, **named) -> dict:
    with serving(server) as url:
        run_module.run(replace(config, url=url), output, **named)
    return json.loads(output.read_text())["tasks"][0]


def scored_badly(
    server: ChatServer, output, config: EvalConfig = CONFIG, **named
) -> tuple[dict, str]:
    with pytest.raises(Unbelievable, match="not valid: ") as caught:
        scored(server, output, config, **named)
    return json.loads(output.read_text())["tasks"][0], str(caught.value)


def counts(entry: dict) -> dict:
    return {name: count for name, count in entry["verdicts"].items() if count}


def test_right_and_wrong_answers_give_the_known_score(output, capsys):
    entry = scored(script(*[WRONG] * 6), output)
    assert entry["n"] == len(ROWS) == 24
    assert counts(entry) == {"correct": 18, "wrong": 6}
    assert entry["score"] == 0.75
    assert entry["problems"] == []
    assert "75.0 %" in capsys.readouterr().out
    assert "75.0 %" in output.with_suffix(".md").read_text()
    assert "75.0 %" in output.with_suffix(".html").read_text()


def test_every_kind_of_answer_has_its_verdict_and_only_right_ones_score(output):
    others = [WRONG, MALFORMED, HEDGED, REFUSED, TRUNCATED, THINKS_ONLY]
    entry, said = scored_badly(script(*others), output)
    assert counts(entry) == {
        "correct": 18, "wrong": 1, "invalid": 3, "refused": 1, "truncated": 1,
    }  # fmt: skip
    assert entry["score"] == 18 / 24
    assert entry["shares"] == {"invalid": 4 / 24, "truncated": 1 / 24, "failed": 0}
    assert said == "not valid: mini-math: 16.7% invalid and 4.2% truncated, more than 5%"
    assert "not valid (75.0 %" in output.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("reply", "one", "two"),
    [(TRUNCATED, "truncated", "8.3% truncated, more than 5%"),
     (MALFORMED, "invalid", "8.3% invalid, more than 5%")],
)  # fmt: skip
def test_above_five_per_cent_a_score_is_not_valid(output, reply, one, two):
    entry = scored(script(reply), output)  # 1 of 24 is 4.2 %
    assert (counts(entry)[one], entry["problems"]) == (1, [])
    entry, said = scored_badly(script(reply, reply), output.with_name("b.json"))
    assert entry["problems"] == [two]
    assert two in said


def test_invalid_and_truncated_count_together(output):
    entry, _ = scored_badly(script(MALFORMED, TRUNCATED), output)  # 4.2 % each
    assert entry["problems"] == ["4.2% invalid and 4.2% truncated, more than 5%"]


@pytest.mark.parametrize(
    ("reason", "verdict"),
    [("stop", "correct"), ("length", "truncated"), ("repetition", "truncated"),
     ("abort", "failed"), ("error", "failed")],
)  # fmt: skip
def test_only_a_whole_answer_is_judged(output, reason, verdict):
    """What the server gave up is no answer of the model's, even where a number can be read."""
    server = script(replace(right(ANSWERS[0]), finish_reason=reason))
    with contextlib.suppress(Unbelievable):
        scored(server, output)
    entry = json.loads(output.read_text())["tasks"][0]
    assert counts(entry) == Counter(["correct"] * 23 + [verdict])


@pytest.mark.parametrize("reply", [Reply(status=500), Reply("The answer is 1", cut=True)])
def test_a_request_that_fails_is_no_answer_and_voids_the_score(output, reply):
    entry, said = scored_badly(script(reply), output)
    assert counts(entry) == {"correct": 23, "failed": 1}
    assert "4.2% of the requests failed" in said


def test_resuming_gives_what_one_run_gives(output):
    others = [WRONG, MALFORMED, TRUNCATED, WRONG]
    whole = scored_badly(script(*others), output)
    cut = output.with_name("cut.json")
    server = script(*others)
    server.die_at = 9
    config = replace(CONFIG, streams=1)
    with serving(server) as url, pytest.raises(ServerUnusable, match="the server went away"):
        run_module.run(replace(config, url=url), cut)
    assert not cut.exists()
    journal = cut.with_suffix(".items.jsonl")
    assert len(journal.read_text().splitlines()) == 1 + 9
    again = script(*others)
    assert scored_badly(again, cut, config, resume=journal) == whole
    assert len(again.bodies) == 24 - 9


@pytest.mark.parametrize("reply", [Reply(status=500), Reply("It is", finish_reason="abort")])
def test_a_resumed_run_asks_what_failed_again(output, capsys, reply):
    """Its result takes the place of the one in which items failed, and of no other."""
    journal = output.with_suffix(".items.jsonl")
    scored_badly(script(reply, WRONG), output)
    again = f"1 items failed; ask them again with: python -m bench eval --resume {journal}"
    assert again in capsys.readouterr().err
    server = script(reply, WRONG)
    server.die_at = 0
    before = output.read_bytes()
    with serving(server) as url, pytest.raises(ServerUnusable):
        run_module.run(replace(CONFIG, url=url), output, resume=journal)
    assert output.read_bytes() == before
    server = script()
    entry = scored(server, output, resume=journal)
    assert counts(entry) == {"correct": 23, "wrong": 1}
    assert len(server.bodies) == 1
    assert "75.0 %" not in output.with_suffix(".md").read_text()
    before = output.read_bytes()
    with pytest.raises(LoadError, match="exists; a result is written once"):
        scored(server, output, resume=journal)
    assert output.read_bytes() == before


def test_another_server_does_not_go_on(output):
    scored(script(), output)
    output.unlink()
    other = script()
    other.window = 8192
    with pytest.raises(LoadError, match="was begun with server window 4096; now it is 8192"):
        scored(other, output, resume=output.with_suffix(".items.jsonl"))
    assert not other.bodies


def test_a_result_is_written_once(output):
    scored(script(), output)
    before = output.read_bytes()
    with pytest.raises(LoadError, match="exists; a result is written once"):
        scored(script(), output)
    assert output.read_bytes() == before


def test_the_journal_holds_prompt_answer_and_verdict(output):
    scored(script(WRONG), output)
    lines = output.with_suffix(".items.jsonl").read_text().splitlines()[1:]
    record = next(r for r in map(json.loads, lines) if r["verdict"] == "wrong")
    assert ROWS[0]["question"] in record["prompt"][0]["content"]
    assert (record["text"], record["extracted"]) == (WRONG.text, "987654")
    assert (record["expected"], record["finish_reason"]) == (ANSWERS[0], "stop")
    assert record["output_tokens"] == 4
    assert next(r for r in map(json.loads, lines) if r["verdict"] == "correct")["reasoning"]


def test_options_reach_the_server(output):
    config = replace(CONFIG, limit=2, reasoning="on", max_tokens=77, temperature=0.5, seed=3)
    server = script()
    entry = scored(server, output, config)
    assert (entry["n"], entry["num_available"]) == (2, 24)
    for body in server.bodies:
        assert body["max_tokens"] == 77
        assert body["temperature"] == 0.5
        assert body["seed"] == 3
        assert body["chat_template_kwargs"] == {"thinking": True}


def test_a_quick_choice_is_the_beginning_of_a_longer_one(output):
    first, more = script(), script()
    scored(first, output, replace(CONFIG, limit=5, streams=1))
    scored(more, output.with_name("b.json"), replace(CONFIG, limit=9, streams=1))
    asked = [[b["messages"][-1]["content"] for b in s.bodies] for s in (first, more)]
    assert asked[0] == asked[1][:5]


def test_letters(output):
    rows = sources.own("mini_choice")[0]
    replies = {row["question"]: Reply(f"The answer is ({row['answer']}).") for row in rows}
    first = rows[0]
    other = "A" if first["answer"] != "A" else "B"
    replies[first["question"]] = Reply(f"The answer is ({other}).")
    config = replace(CONFIG, tasks=(TaskName.MINI_CHOICE,))
    entry = scored(ChatServer(replies), output, config)
    assert counts(entry) == {"correct": 23, "wrong": 1}
    assert sum(g["n"] for g in entry["groups"]) == 24


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
def test_programs_are_run(output):
    rows = sources.own("mini_code")[0]
    replies = {
        row["prompt"].strip(): Reply(f"```python\n{row['prompt']}{row['canonical_solution']}```")
        for row in rows
    }
    replies[rows[0]["prompt"].strip()] = Reply(f"```python\n{rows[0]['prompt']}    return -99\n```")
    entry = scored(ChatServer(replies), output, replace(CONFIG, tasks=(TaskName.MINI_CODE,)))
    assert counts(entry) == {"correct": 9, "wrong": 1}
    assert entry["syntactic_share"] == 1.0
