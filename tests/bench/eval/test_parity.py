"""Greedy parity on answers whose tokens and gaps are given."""

import asyncio
import json
from dataclasses import replace

import pytest

from bench.client import Choices
from bench.eval import parity, parity_judge, parity_run, stats
from bench.eval.cli import main
from bench.eval.parity import Control, Speculative
from bench.eval.parity_judge import Excess, Parting
from bench.eval.parity_run import ParityConfig
from bench.load.errors import LoadError, Unbelievable
from bench.load.server import ServerFacts
from bench.measurement import Prompt
from tests.bench.fake_openai import FakeEngine, fake_openai

FACTS = ServerFacts("fake", 4096, "0.32.0", None, None)
PROMPTS = [Prompt(f"p{i}", f"text {i}") for i in range(20)]
TOKENS = (1, 2, 3)
PROVENANCE = {"device": "x", "gpus": None, "vllm": "0.32.0", "commit": "0" * 40, "dirty": False,
              "date": "2026-01-01T00:00:00Z", "command": "bench eval parity"}  # fmt: skip


def choices(tokens=TOKENS, gaps=(2.0, 2.0, 2.0)) -> Choices:
    """The second best token is always the best one plus 100."""
    pairs = zip(tokens, gaps, strict=True)
    return Choices(tuple(tokens), tuple(((t, -0.5), (t + 100, -0.5 - gap)) for t, gap in pairs))


def control(again: dict[int, Choices] | None = None, base: dict[int, Choices] | None = None):
    first = [(base or {}).get(i, choices()) for i in range(len(PROMPTS))]
    second = [(again or {}).get(i, one) for i, one in enumerate(first)]
    return Control(FACTS, tuple(first), tuple(second))


def drafted(
    other: dict[int, tuple[int, ...]] | None = None, num_drafts: int | None = 40, accepted: int = 40
):
    ids = [(other or {}).get(i, TOKENS) for i in range(len(PROMPTS))]
    return Speculative(FACTS, tuple(ids), num_drafts, accepted)


def judged(control: Control, speculative: Speculative) -> dict:
    return parity_judge.judge(PROMPTS, control, speculative)


def test_the_same_texts_are_parity():
    found = judged(control(), drafted())
    assert found["problems"] == []
    assert (found["n"], found["alpha"]) == (20, parity_judge.ALPHA)
    assert found["noise"] == {"limit": 0.0, "quantile": 0.99, "num_positions": 60, "median": 0.0,
                              "largest": 0.0}  # fmt: skip
    for side in (found["control"], found["mtp"]):
        assert (side["num_identical"], side["share_identical"], side["partings"]) == (20, 1.0, [])
    for test in (found["parted"], found["clear"]):
        counts = ("control", "mtp", "mtp_only", "control_only")
        assert [test[name] for name in counts] == [0, 0, 0, 0]
        assert test["p"] == 1.0
        assert 0.3 < test["detectable"] < 0.5
    parity_judge.check(found)


def test_the_noise_is_what_all_but_one_in_a_hundred_gaps_move():
    """One far movement is none, two of sixty positions are: it is an observed value."""
    one = judged(control({0: choices(gaps=(2.0, 1.8, 2.0)), 1: choices(gaps=(0.5, 2.0, 2.0))}),
                 drafted())["noise"]  # fmt: skip
    assert one["limit"] == one["largest"] == pytest.approx(1.5)
    prompts = PROMPTS * 10
    base = [choices() for _ in prompts]
    again = [choices(gaps=(0.5, 2.0, 2.0)), *[choices(gaps=(2.0, 1.8, 2.0))] * 6, *base[7:]]
    many = parity_judge.judge(prompts, Control(FACTS, tuple(base), tuple(again)),
                              Speculative(FACTS, (TOKENS,) * 200, 1, 1))["noise"]  # fmt: skip
    assert many["num_positions"] == 600
    assert many["limit"] == pytest.approx(0.2)
    assert many["largest"] == pytest.approx(1.5)
    assert many["median"] == 0.0


def test_a_text_may_part_where_the_gap_is_within_the_noise():
    noisy = {1: choices(gaps=(2.0, 1.7, 2.0))}
    close = {0: choices(gaps=(2.0, 0.2, 2.0))}
    found = judged(control(noisy, close), drafted({0: (1, 102, 3)}))
    assert found["noise"]["limit"] == pytest.approx(0.3)
    (parting,) = found["mtp"]["partings"]
    assert parting == {"prompt_id": "p0", "position": 1, "gap": pytest.approx(0.2),
                       "near_tie": True}  # fmt: skip
    assert found["mtp"]["num_identical"] == 19
    assert (found["parted"]["mtp"], found["clear"]["mtp"]) == (1, 0)


@pytest.mark.parametrize(
    ("ids", "place"),
    [
        ((1, 102, 3), "at token 1 (gap 2.000)"),
        ((1, 55, 3), "at token 1 (not among the 8 best)"),
        ((1, 2), "at token 2 (not among the 8 best)"),
        ((1, 2, 3, 4), "at token 3 (not among the 8 best)"),
    ],
    ids=["a clear token", "a token from nowhere", "shorter", "longer"],
)
def test_texts_that_part_at_a_clear_token_break_parity(ids, place):
    """Eight texts part in both runs, so that no more part; with MTP all eight at a clear one."""
    tie = {i: choices(gaps=(0.1, 2.0, 2.0)) for i in range(8)}
    usual = control({i: choices((101, 2, 3), (0.2, 2.0, 2.0)) for i in tie}, tie)
    found = judged(usual, drafted(dict.fromkeys(tie, ids)))
    (problem,) = found["problems"]
    assert problem.startswith("8 of 20 texts part at a clear token, 0 in the control, p = 0.0039")
    assert problem.endswith(f": p0 {place}, p1 {place}, p2 {place}")
    with pytest.raises(Unbelievable, match="no parity: 8 of 20 texts part at a clear token"):
        parity_judge.check(found)


def test_clear_partings_that_the_control_has_too_are_not_held_against_mtp():
    elsewhere = {i: choices((55, 2, 3)) for i in range(5)}
    found = judged(control(elsewhere), drafted({i: (1, 55, 3) for i in range(3, 9)}))
    assert found["problems"] == []
    clear = found["clear"]
    assert (clear["control"], clear["mtp"]) == (5, 6)
    assert (clear["mtp_only"], clear["control_only"]) == (4, 3)


def test_a_third_token_in_a_tie_of_three_is_a_near_tie():
    tied = Choices(TOKENS, tuple(((t, -1.0), (t + 100, -1.0), (t + 200, -1.0)) for t in TOKENS))
    found = judged(control(base={0: tied}), drafted({0: (1, 202, 3)}))
    assert found["mtp"]["partings"][0]["gap"] == 0.0
    assert found["clear"]["mtp"] == 0


def test_more_near_ties_than_the_control_has_break_parity():
    tie = {i: choices(gaps=(2.0, 0.1, 2.0)) for i in range(20)}
    moved = {0: choices((1, 102, 3), gaps=(2.0, 0.1, 2.0)), 1: choices(gaps=(2.0, 0.3, 2.0))}
    few = judged(control(moved, tie), drafted({i: (1, 102, 3) for i in range(5)}))
    assert few["problems"] == []
    many = judged(control(moved, tie), drafted({i: (1, 102, 3) for i in range(20)}))
    (problem,) = many["problems"]
    assert problem == "20 of 20 texts part, 1 in the control, p = 1.9e-06"


@pytest.mark.parametrize(("mtp_only", "shown"), [(6, False), (7, True)])
def test_seven_texts_beyond_the_controls_are_shown(mtp_only, shown):
    """One half to the seventh is the first below 0.01; the other way round nothing is."""
    names = {f"p{i}" for i in range(mtp_only)}
    more = Excess.of(20, {"p18"}, names | {"p18"})
    assert (more.control, more.mtp, more.mtp_only, more.control_only) == (
        1,
        mtp_only + 1,
        mtp_only,
        0,
    )
    assert more.p == pytest.approx(0.5**mtp_only)
    assert more.is_shown == shown
    fewer = Excess.of(20, names, set())
    assert (fewer.p, fewer.is_shown) == (1.0, False)


def test_the_excess_that_can_be_seen_is_that_of_the_one_sided_test():
    """A power of 80 % at the share that is named, and less below, with the control's churn."""
    churned = Excess.of(200, {f"c{i}" for i in range(10)}, {f"m{i}" for i in range(8)})
    for share, enough in ((churned.detectable, True), (churned.detectable - 0.001, False)):
        power = stats.power(200, share, 10 / 200, 2 * parity_judge.ALPHA)
        assert (power >= stats.POWER) == enough
    quiet = Excess.of(200, set(), set())
    assert quiet.detectable < churned.detectable < 0.2


def test_a_control_that_leaves_no_text_whole_shows_nothing():
    parted = {i: choices((1, 55, 3)) for i in range(18)}
    found = judged(control(parted), drafted({i: (1, 55, 3) for i in range(20)}))
    assert found["problems"] == [
        f"18 of 20 texts {what} in the control: too few are left to show anything of MTP"
        for what in ("part", "part at a clear token")
    ]
    assert found["parted"]["detectable"] is None


@pytest.mark.parametrize("num_drafts", [0, None])
def test_without_drafts_nothing_is_shown(num_drafts):
    found = judged(control(), drafted(num_drafts=num_drafts))
    assert found["problems"] == ["the server with MTP drafted nothing: this says nothing about MTP"]


def test_a_head_that_is_never_right_shows_nothing():
    found = judged(control(), drafted(num_drafts=1000, accepted=0))
    assert found["problems"] == [
        "none of 1000 drafts was accepted: a head that is never right says nothing about MTP"
    ]
    assert judged(control(), drafted(num_drafts=1000, accepted=1))["problems"] == []


def test_a_parting_without_a_gap_is_no_near_tie():
    assert not Parting("p", 0, None).within(100.0)


def test_there_are_two_hundred_prompts_and_each_is_its_own():
    prompts = parity.default_prompts(200)
    assert len(prompts) == len({p.id for p in prompts}) == len({p.text for p in prompts}) == 200
    assert parity.default_prompts(40) == parity.default_prompts(200)[:40]
    with pytest.raises(LoadError, match="100000 prompts; there are"):
        parity.default_prompts(100_000)


def test_the_table_counts_what_parts_and_no_key_is_kept():
    config = ParityConfig(off_url="http://user:s3cret@a:1", on_url="http://b:2", num_prompts=20)
    clear = {i: (1, 55, 3) for i in range(8)}
    found = parity_run.assemble(config, PROMPTS, control(), drafted(clear), PROVENANCE)
    assert "s3cret" not in json.dumps(found)
    (first, second) = parity_run.rows(found)
    assert first[1:] == ["20 of 20", "100.0 %", "0", "0", "-"]
    assert second[1:] == ["12 of 20", "60.0 %", "0", "8", "1"]
    assert [row[1:5] for row in parity_run.tests(found)] == [["0", "8", "8 / 0", "0.00391"]] * 2
    seen = f"{100 * found['clear']['detectable']:.1f} points"
    assert [row[5] for row in parity_run.tests(found)] == [seen] * 2
    assert parity_run.verdict(found).startswith("No parity: 8 of 20 texts part")
    for shown in (parity_run.page(found), parity_run.render(found)):
        assert "No parity: 8 of 20 texts part" in shown
        assert "no parity at p &lt;= 0.01" in shown or "no parity at p <= 0.01" in shown
        assert seen in shown
        assert "s3cret" not in shown


@pytest.mark.parametrize(
    ("on", "status", "says"),
    [
        ({}, 0, ""),
        ({"change_token": 2}, 1, "8 of 8 texts part at a clear token, 0 in the control"),
        # All tokens at position 3 are equally likely.
        ({"change_token": 3}, 1, "no parity: 8 of 8 texts part, 0 in the control, p = 0.0039"),
        ({"change_token": 3, "change_by": 9}, 1, "(not among the 8 best)"),
        ({"num_speculative_tokens": 0}, 1, "drafted nothing"),
        ({"token_ids": False}, 3, "no token ids in the answer"),
        ({"status": 500}, 3, "HTTP 500"),
    ],
)
def test_two_servers_are_asked_and_judged(capsys, tmp_path, on, status, says):
    without = FakeEngine(gaps={3: 0.0}, moved_together=0.01)
    speculating = FakeEngine(**({"num_speculative_tokens": 1} | on))
    output = tmp_path / "out.json"
    with fake_openai(without) as off_url, fake_openai(speculating) as on_url:
        arguments = ["--off-url", off_url, "--on-url", on_url, "--num-prompts", "8"]
        arguments += ["--max-tokens", "5", "--result", str(output)]
        assert main(["parity", *arguments]) == status
        complaints = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("bench eval")
        ]
        assert says in "".join(complaints)
        assert len(complaints) == (status != 0)
        assert output.exists() == (status != 3)
        if status != 3:  # a result is written once, and nothing is asked in vain
            asked = len(without.bodies)
            assert main(["parity", *arguments]) == 2
            assert len(without.bodies) == asked
    assert all(body["temperature"] == 0 for body in without.bodies + speculating.bodies)


@pytest.mark.parametrize(("before", "told"), [(3, 3), (0, 4)], ids=["before", "meanwhile"])
def test_the_control_must_not_draft(capsys, tmp_path, monkeypatch, before, told):
    """Where it has drafted before, nothing is asked."""
    drafting = FakeEngine(num_speculative_tokens=1)
    drafting.drafts = before
    answer = drafting.answer

    def drafted_answer(*asked):
        drafting.drafts += 1
        return answer(*asked)

    monkeypatch.setattr(drafting, "answer", drafted_answer)
    with fake_openai(drafting) as url:
        arguments = ["--off-url", url, "--on-url", url, "--num-prompts", "2", "--max-tokens", "5"]
        assert main(["parity", *arguments, "--result", str(tmp_path / "out.json")]) == 2
    assert f"must be without MTP; it has {told} drafts" in capsys.readouterr().err
    assert bool(drafting.bodies) == (not before)


@pytest.mark.parametrize("page", ["", "other:requests_total 3.0\n"])
def test_a_control_that_does_not_tell_whether_it_drafts_is_refused(
    capsys, tmp_path, monkeypatch, page
):
    silent = FakeEngine()
    monkeypatch.setattr(silent, "metrics_page", lambda: page)
    with fake_openai(silent) as url:
        arguments = ["--off-url", url, "--on-url", url, "--num-prompts", "2", "--max-tokens", "5"]
        assert main(["parity", *arguments, "--result", str(tmp_path / "out.json")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "must be without MTP; its /metrics has no counters to tell that by" in said
    assert not silent.bodies


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"model": "another"}, "model fake, not another"),
        ({"window": 8192}, "window 4096, not 8192"),
        ({"root": "/models/another"}, "checkpoint None, not another"),
    ],
)
def test_mtp_on_another_model_is_refused(monkeypatch, other, says):
    speculating = FakeEngine(num_speculative_tokens=1)
    with fake_openai(speculating) as url:
        asked = parity.ask_speculative(url, PROMPTS, 5, 1, 60.0, control=replace(FACTS, **other))
        with pytest.raises(LoadError, match=f"must be the server without MTP but for MTP: {says}$"):
            asyncio.run(asked)
        assert not speculating.bodies
        asyncio.run(parity.ask_speculative(url, PROMPTS, 5, 1, 60.0, control=FACTS))


def test_the_two_servers_must_serve_the_same(capsys, tmp_path, monkeypatch):
    ask = parity.ask_control

    async def of_another(*arguments):
        found = await ask(*arguments)
        return replace(found, facts=replace(found.facts, window=8192))

    monkeypatch.setattr(parity, "ask_control", of_another)
    with fake_openai(FakeEngine()) as off, fake_openai(FakeEngine(num_speculative_tokens=1)) as on:
        arguments = ["--off-url", off, "--on-url", on, "--num-prompts", "2", "--max-tokens", "5"]
        assert main(["parity", *arguments, "--result", str(tmp_path / "out.json")]) == 2
    assert f"{on}: must be the server without MTP" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "parity needs --off-url and --on-url, or --profile"),
        (["--off-url", "http://a"], "parity needs --off-url and --on-url, or --profile"),
        (["--off-url", "http://a", "--on-url", "http://b", "--profile", "x"],
         "parity needs --off-url and --on-url, or --profile"),
        (["--profile", "x", "--num-prompts", "0"], "num_prompts = 0; must be at least 1"),
        (["--profile", "x", "--prompts", "{tmp}/none.jsonl"], "none.jsonl: No such file"),
        (["--profile", "x", "--prompts", "{tmp}/bad.jsonl"], "each line must be {id, text}"),
        (["--profile", "x", "--prompts", "{tmp}/two.jsonl"], "2 prompts; 200 are asked for"),
    ],
)  # fmt: skip
def test_bad_input(capsys, tmp_path, arguments, says):
    (tmp_path / "bad.jsonl").write_text('{"id": "a"}\n')
    (tmp_path / "two.jsonl").write_text("".join(f'{{"id": "{i}", "text": "t"}}\n' for i in "ab"))
    named = [text.format(tmp=tmp_path) for text in arguments]
    assert main(["parity", *named, "--result", str(tmp_path / "out.json")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert says in said
