"""`bench run` against a server whose timing is known."""

import json
import statistics
from dataclasses import replace

import jsonschema
import pytest

from bench.load import result as result_module
from bench.load import run as run_module
from bench.load.cli import main
from bench.load.config import Api, LoadConfig, Mode, Speculation
from bench.load.errors import LoadError, ServerUnusable, Unbelievable
from bench.load.journal import Journal
from bench.load.prompts import TokenPrompts
from bench.load.server import lasting
from bench.load.telemetry import Telemetry
from tests.bench.load.fake_nvml import FakeNvml
from tests.bench.load.fake_server import FakeServer, serving

CONFIG = LoadConfig(contexts=(300,), streams=(2,), output=41, repeats=3, max_warm_up_rounds=1)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "results" / "load.json"


def measure(server: FakeServer, output, config: LoadConfig = CONFIG, **changes) -> dict:
    with serving(server) as url:
        return run_module.run(replace(config, url=url, **changes), output)


def measured_badly(server: FakeServer, output, config: LoadConfig = CONFIG, **changes) -> str:
    with pytest.raises(Unbelievable) as caught:
        measure(server, output, config, **changes)
    assert json.loads(output.read_text())["cells"][0]["problems"]
    return str(caught.value)


@pytest.mark.parametrize(
    ("tokens_per_chunk", "first"), [(1, 1), (2, 1), (3, 3)], ids=["plain", "mtp", "three"]
)
def test_known_delays_are_recovered(output, tokens_per_chunk, first):
    """Up to what this machine added to them, which is a few ms where it is not busy."""
    server = FakeServer(
        ttft_s=0.3, gap_s=0.06, tokens_per_chunk=tokens_per_chunk, first_chunk_tokens=first
    )
    config = replace(CONFIG, output=10, max_warm_up_rounds=0)
    cell = measure(server, output, config)["cells"][0]
    chunks = len(server.split(10))
    decode_s = (chunks - 1) * 0.06
    late_s = 0.001
    for done in cell["rounds"]:
        sent_s = [request["sent_s"] for request in done["requests"]]
        for request in done["requests"]:
            for number, (at_s, _, _) in enumerate(request["chunks"]):
                assert at_s - request["sent_s"] > 0.3 + number * 0.06  # never before it was written
                late_s = max(late_s, at_s - min(sent_s) - 0.3 - number * 0.06)
    late_wall_s = max(done["wall_s"] for done in cell["rounds"]) - 0.3 - decode_s
    assert cell["ttft_ms"]["value"] == pytest.approx(300, abs=1000 * late_s)
    assert cell["e2el_ms"]["value"] == pytest.approx(300 + decode_s * 1000, abs=1000 * late_s)
    assert cell["tpot_ms"]["value"] * 9 == pytest.approx(decode_s * 1000, abs=1000 * late_s)
    assert cell["itl_ms"]["p50"] == pytest.approx(60, abs=1000 * late_s)
    assert cell["itl_ms"]["num"] == 6 * (chunks - 1)
    itl_ms = cell["itl_per_token_ms"]["p50"] * tokens_per_chunk
    assert itl_ms == pytest.approx(60, abs=1000 * late_s)
    assert cell["itl_per_token_ms"]["num"] == 6 * (10 - first)
    assert 9 / cell["decode_tok_s"]["value"] == pytest.approx(decode_s, abs=late_s)
    wall_s = 20 / cell["output_throughput"]["value"]
    assert wall_s == pytest.approx(0.3 + decode_s, abs=late_wall_s)
    overlap_s = 2 * (10 - first) / cell["overlap_tok_s"]["value"]
    assert overlap_s == pytest.approx(decode_s, abs=0.15 * decode_s + late_s)  # a chunk may be out
    assert 290 / cell["prefill_tok_s"]["value"] == pytest.approx(0.3, abs=late_s)
    assert cell["acceptance"] is None
    assert cell["energy_j_per_token"] is None


def test_chunks_are_timed_when_the_server_wrote_them(output):
    gap_s = 0.04
    server = FakeServer(gap_s=gap_s)
    config = replace(CONFIG, streams=(1,), output=21, repeats=1, max_warm_up_rounds=0)
    rounds = measure(server, output, config)["cells"][0]["rounds"]
    for done, written in zip(rounds, server.written, strict=True):
        (request,) = done["requests"]
        seen = [at for at, _, _ in request["chunks"]]
        late = [at - w for at, w in zip(seen, written, strict=True)]  # from another zero
        usual = statistics.median(late)
        assert statistics.median(abs(one - usual) for one in late) < gap_s / 2


def test_the_result_fits_its_schema_and_has_its_provenance(output):
    measure(FakeServer(), output)
    result = result_module.read(output)
    assert result["config"]["contexts"] == [300]
    cell = result["cells"][0]
    assert (cell["window"], cell["context"], cell["depth"]) == (4096, 300, 259)
    assert result["server"]["version"] == "0.0.fake"
    assert result["provenance"]["series_sha256"]
    assert result["provenance"]["gpus"] is None
    assert str(output.parent) not in output.read_text()
    assert "| 4,096 / 259 / 2 |" in output.with_suffix(".md").read_text()
    assert output.with_suffix(".html").exists()
    assert not list(output.parent.glob("*.jsonl"))
    del cell["ttft_ms"]
    with pytest.raises(jsonschema.ValidationError, match="ttft_ms"):
        result_module.write(output.with_name("other.json"), result)
    assert not output.with_name("other.json").exists()


def test_prompts_have_the_exact_length_and_share_no_block(output):
    server = FakeServer()
    measure(server, output)
    prompts = [body["prompt"] for body in server.bodies[2:]]  # after a round of warm-up
    assert {len(p) for p in prompts} == {259}
    assert {p[0] for p in prompts} == {1}  # BOS
    assert len({tuple(p[: server.block]) for p in prompts}) == 6
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in server.bodies)


def test_two_runs_ask_the_same_text_with_other_nonces(output):
    server = FakeServer()
    for name in ("a.json", "b.json"):
        measure(server, output.with_name(name), max_warm_up_rounds=0)
    first, second = server.bodies[:6], server.bodies[6:]
    for a, b in zip(first, second, strict=True):
        assert a["prompt"][17:] == b["prompt"][17:]
        assert a["prompt"][:17] != b["prompt"][:17]


def test_identical_prompts_are_flagged_as_contaminated(output, monkeypatch):
    make = TokenPrompts.make
    monkeypatch.setattr(TokenPrompts, "make", lambda self, n, _: self._fixed(make, n))
    fixed = {}
    monkeypatch.setattr(
        TokenPrompts,
        "_fixed",
        lambda self, make, n: fixed.setdefault(n, make(self, n, "same")),
        raising=False,
    )
    message = measured_badly(FakeServer(), output)
    assert "contaminated: 98.8% of a prompt came from the prefix cache" in message
    assert result_module.read(output)["cells"][0]["cache"]["contaminated"] is True


def test_without_cached_tokens_in_usage_the_counters_tell(output):
    cell = measure(FakeServer(cached_details=False), output)["cells"][0]
    assert cell["cache"]["contaminated"] is False
    assert cell["prefill_tok_s"] is None


def test_where_nothing_tells_contamination_is_unknown(output):
    server = FakeServer(cached_details=False, metrics_page=False)
    assert measure(server, output)["cells"][0]["cache"]["contaminated"] is None


def test_a_warm_prompt_is_in_the_cache_and_a_follow_up_but_for_its_end(output):
    warm = measure(FakeServer(), output, mode=Mode.WARM)["cells"][0]
    assert warm["cache"]["cached_share"] == pytest.approx(256 / 259)
    assert warm["prefill_tok_s"]["value"] < 400
    config = replace(CONFIG, contexts=(3000,), mode=Mode.FOLLOWUP)
    followup = measure(FakeServer(), output.with_name("f.json"), config)["cells"][0]
    assert followup["cache"]["primed_tokens"] == 1959
    assert followup["cache"]["cached_share"] == pytest.approx(1952 / 2959)


def test_a_warm_run_without_a_cache_is_flagged(output):
    config = replace(CONFIG, contexts=(3000,), mode=Mode.WARM)
    message = measured_badly(FakeServer(cache=False), output, config)
    assert "0.0% of a prompt at most came from the prefix cache; 2959 of 2959" in message


def test_acceptance_is_that_of_the_counters_and_of_the_requests(output):
    server = FakeServer(tokens_per_chunk=2, num_speculative_tokens=1)
    measured = measure(server, output, streams=(1,))["cells"][0]["acceptance"]
    # 41 tokens: one, then 20 drafts of which each was accepted
    assert measured["source"] == "counters"
    assert measured["num_drafts"] == 60
    assert measured["rate"] == 1
    assert measured["length"] == 2
    assert measured["per_position"] == [1]
    assert measured["per_request"] == [2, 2, 2]
    assert measured["requests_agree"] is True


def test_counters_that_stay_at_zero_stop_the_run(output):
    server = FakeServer(num_speculative_tokens=1, inert_counters=True)
    with pytest.raises(Unbelievable, match="stayed at 0 over the warm-up"):
        measure(server, output)
    assert not output.exists()
    message = measured_badly(server, output, max_warm_up_rounds=0)
    assert "num_drafts, num_draft_tokens, num_accepted_tokens stayed at 0" in message


def test_drafts_of_which_none_is_accepted_fail_the_run(output):
    server = FakeServer(num_speculative_tokens=1)  # one token in each chunk
    assert "num_accepted_tokens stayed at 0" in measured_badly(server, output)


def test_speculation_can_be_demanded_and_forbidden(output):
    message = measured_badly(FakeServer(), output, speculation=Speculation.ON)
    assert "no acceptance metrics" in message
    output.unlink()
    server = FakeServer(num_speculative_tokens=1, tokens_per_chunk=2)
    message = measured_badly(server, output, speculation=Speculation.OFF)
    assert "was to run without" in message


def test_traffic_of_others_is_noticed(output):
    message = measured_badly(FakeServer(extra_tokens=5), output)
    assert "other traffic: the engine generated 276 tokens and this run asked for 246" in message


def test_chats_are_fitted_to_the_servers_own_count(output):
    server = FakeServer(reasoning_chunks=3)
    config = replace(CONFIG, api=Api.CHAT, repeats=1, max_warm_up_rounds=0)
    cell = measure(server, output, config)["cells"][0]
    requests = [r for done in cell["rounds"] for r in done["requests"]]
    assert all(251 <= r["prompt_tokens"] <= 259 for r in requests)
    for at, figure in ((0, "ttft_ms"), (3, "time_to_first_content_ms")):
        first_ms = [1000 * (r["chunks"][at][0] - r["sent_s"]) for r in requests]
        assert cell[figure]["value"] == pytest.approx(statistics.median(first_ms), abs=0.01)


def test_without_a_running_count_tokens_of_chunks_are_not_known(output):
    server = FakeServer(running_usage=False, tokens_per_chunk=2, gap_s=0.01)
    cell = measure(server, output)["cells"][0]
    assert cell["itl_per_token_ms"] is None
    assert cell["overlap_tok_s"] is None
    chunks = [r["chunks"] for done in cell["rounds"] for r in done["requests"]]
    assert {len(one) for one in chunks} == {21}
    tpots = [1000 * (one[-1][0] - one[0][0]) / 40 for one in chunks]  # tokens after the first
    assert min(tpots) - 0.01 <= cell["tpot_ms"]["value"] <= max(tpots) + 0.01


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"error_at": 3}, "error in the stream: engine died"),
        ({"malformed_at": 3}, "malformed stream: b'{not json'"),
        ({"truncated_at": 3}, r"ended before \[DONE\]"),
    ],
)
def test_a_request_that_fails_is_counted_and_fails_the_run(output, fault, message):
    with pytest.raises(Unbelievable, match=f"1 of 6 requests failed: .*{message}"):
        measure(FakeServer(**fault), output)
    cell = result_module.read(output)["cells"][0]
    assert cell["num_failed"] == 1
    assert cell["output_throughput"]["num"] == 2  # the round with the failure has none
    assert cell["ttft_ms"]["num"] == 3


def test_an_answer_without_usage_fails(output):
    with pytest.raises(ServerUnusable, match="warm-up: the stream held no usage"):
        measure(FakeServer(usage=False, running_usage=False), output)


def test_an_answer_of_another_length_fails(output):
    message = measured_badly(FakeServer(ignore_cap=7), output)
    assert "7 output tokens; 41 were asked for" in message


def test_a_server_that_dies_leaves_a_journal_and_the_run_goes_on_from_it(output):
    server = FakeServer(die_at=2 + 2 * 2)  # a round of warm-up, two measured
    with pytest.raises(ServerUnusable, match="the server went away during a round"):
        measure(server, output)
    assert not output.exists()
    journal = output.with_suffix(".rounds.jsonl")
    assert len(Journal.load(journal).done) == 2
    again = FakeServer()
    with serving(again) as url:
        run_module.run(LoadConfig(url=url), output, resume=journal)
    assert len(again.bodies) == 2 + 2
    cell = result_module.read(output)["cells"][0]
    assert [done["repeat"] for done in cell["rounds"]] == [0, 1, 2]
    assert not journal.exists()


def test_two_lives_of_a_service_may_find_other_cache_sizes():
    cache = {"block_size": "256", "num_gpu_blocks": "6682", "kv_cache_size_tokens": "9"}
    first = {"model": "m", "window": 1, "version": "0", "cache": cache, "checkpoint": "c"}
    assert lasting(first) == lasting(first | {"cache": cache | {"num_gpu_blocks": "6680"}})
    assert lasting(first) != lasting(first | {"cache": cache | {"block_size": "16"}})
    assert lasting(first) != lasting(first | {"cache": None})


def test_another_server_cannot_go_on_with_a_journal(output):
    with pytest.raises(ServerUnusable):
        measure(FakeServer(die_at=6), output)
    with serving(FakeServer(window=8192)) as url, pytest.raises(LoadError, match="was begun on"):
        run_module.run(LoadConfig(url=url), output, resume=output.with_suffix(".rounds.jsonl"))


def test_ctrl_c_keeps_the_rounds_that_are_done(output, monkeypatch, capsys):
    real = run_module.Journal.add

    def interrupt(self, done):
        real(self, done)
        if len(self.done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Journal, "add", interrupt)
    with serving(FakeServer()) as url:
        status = main(
            ["run", "--url", url, "--context", "300", "--output", "5", "--result", str(output)]
        )
    assert status == 130
    printed = capsys.readouterr()
    assert "| 0 / 2 | 2 |" in printed.out
    assert "--resume" in printed.err
    assert not output.exists()
    assert len(Journal.load(output.with_suffix(".rounds.jsonl")).done) == 2


def test_goodput_counts_what_is_within_every_limit(output):
    limits = (("ttft_ms", 10_000.0), ("tpot_ms", 60.0))
    server = FakeServer(gap_s=0.01, slower_each_request_s=0.03)
    changes = {"streams": (1,), "output": 11, "repeats": 4, "goodput": limits}
    cell = measure(server, output, replace(CONFIG, max_warm_up_rounds=0, **changes))["cells"][0]
    chunks = [r["chunks"] for done in cell["rounds"] for r in done["requests"]]
    within = [one[-1][0] - one[0][0] <= 10 * 0.06 for one in chunks]
    assert 0 < sum(within) < 4  # 10, 40, 70 and 100 ms, and what this machine adds
    assert cell["goodput_share"] == pytest.approx(sum(within) / 4)
    assert cell["goodput_req_s"] is not None


def test_cells_are_interleaved_and_every_other_repeat_goes_backwards():
    assert run_module.plan(3, 2) == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]


def test_a_sweep_has_a_cell_for_each_combination(output):
    measured = measure(FakeServer(gap_s=0.001), output, contexts=(200, 300), streams=(1, 2))
    cells = [(c["depth"], c["max_concurrency"]) for c in measured["cells"]]
    assert cells == [(159, 1), (159, 2), (259, 1), (259, 2)]


def test_the_gpus_of_this_machine_are_in_the_result(output, monkeypatch):
    telemetry = Telemetry(FakeNvml(slow_s=0.01), [1, 2])
    monkeypatch.setattr(Telemetry, "for_url", lambda url: telemetry)
    measured = measure(FakeServer(gap_s=0.005), output, repeats=1)
    (cell,) = measured["cells"]
    (done,) = cell["rounds"]
    begin = min(r["sent_s"] for r in done["requests"])
    end = max(r["chunks"][-1][0] for r in done["requests"])
    assert done["energy_j"] == pytest.approx(3000 * (end - begin), rel=0.05)  # 1 and 2 kW
    assert cell["energy_j_per_token"]["value"] == pytest.approx(done["energy_j"] / 82)
    assert done["sm_clock_mhz"] == {"low": 1000, "median": 1500, "high": 2000}
    assert cell["throttle_reasons"] == ["sw_power_cap"]
    device = {
        "name": "NVIDIA Fake", "driver": "580.1", "power_limit_w": 300, "pcie_generation": 5,
        "pcie_width": 16, "max_sm_clock_mhz": 2400, "max_memory_clock_mhz": 14_000,
    }  # fmt: skip
    assert measured["provenance"]["gpus"] == [device] * 2
    text = output.with_suffix(".md").read_text()
    assert "GPU clocks were held down: sw_power_cap." in text
    assert "2 x NVIDIA Fake, driver 580.1" in text


def test_the_server_behind_the_port_is_in_the_result(output):
    measured = measure(FakeServer(), output, repeats=1)
    (command, *_) = measured["provenance"]["server"]["commands"]
    assert "pytest" in command  # the fake runs in this process


def test_a_dry_run_checks_and_sends_nothing(output, capsys):
    server = FakeServer()
    with serving(server) as url:
        options = ["run", "--url", url, "--dry-run", "--result", str(output), "--output", "50"]
        assert main([*options, "--context", "300,1k", "--streams", "2", "--repeats", "3"]) == 0
        rows = capsys.readouterr().out.splitlines()[2:4]
        assert rows == [
            "| 4,096 / 300 / 250 / 2 | 3 | 1,500 | 300 |",
            "| 4,096 / 1,000 / 950 / 2 | 3 | 5,700 | 300 |",
        ]
        assert main([*options, "--context", "60"]) == 2
        assert "depth 10: must be at least 18" in capsys.readouterr().err
    assert server.bodies == []
    assert not output.parent.exists()


def test_quick_asks_for_less_but_not_for_less_than_it_is_told(output):
    with serving(FakeServer(window=16_384, gap_s=0.0001)) as url:
        options = ["run", "--url", url, "--result", str(output), "--output", "7"]
        assert main([*options, "--quick"]) == 0
    measured = result_module.read(output)
    (cell,) = measured["cells"]
    assert (cell["depth"], cell["num_repeats"]) == (8192, 2)
    assert measured["config"]["output"] == 7


def run_main(*options: str) -> int:
    return main(
        [
            "run",
            "--context",
            "300",
            "--output",
            "5",
            "--repeats",
            "1",
            "--max-warm-up-rounds",
            "0",
            *options,
        ]
    )


def test_bad_input_is_one_line_and_a_status(output, capsys):
    with serving(FakeServer(api_key="right")) as url:
        assert run_main("--url", url, "--result", str(output)) == 3
        assert "the key is wrong or missing" in capsys.readouterr().err
    with serving(FakeServer()) as url:
        for options, line in [
            (["--model", "other"], "model other: the server has fake"),
            (["--context", "8k"], "context 8000: the server's window is 4096 tokens"),
            (["--depth", "299"], "depth 299 + output 5 = 304 tokens; must fit into the context"),
            (["--depth", "10"], "depth 10: must be at least 18, for the nonce"),
        ]:
            assert run_main("--url", url, "--result", str(output), *options) == 2
            said = capsys.readouterr().err.strip().splitlines()
            assert len(said) == 1
            assert line in said[0]
    assert run_main("--url", "http://127.0.0.1:9", "--result", str(output)) == 3
    assert "no server" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("fault", "options", "status", "line", "written"),
    [
        ({}, ["--speculation", "on"], 1, "speculation: no acceptance metrics", True),
        ({"malformed_at": 0}, [], 1, "1 of 1 requests failed: malformed stream", True),
        ({"die_at": 0}, [], 3, "the server went away during a round", False),
    ],
    ids=["no acceptance metrics", "malformed stream", "dying"],
)
def test_a_bad_server_is_one_line_and_a_status(
    output, capsys, fault, options, status, line, written
):
    with serving(FakeServer(**fault)) as url:
        assert run_main("--url", url, "--result", str(output), *options) == status
    said = [s for s in capsys.readouterr().err.splitlines() if s.startswith("bench: ")]
    assert len(said) == 1
    assert line in said[0]
    assert output.exists() is written
    assert {p.suffix for p in output.parent.iterdir()} == (
        {".json", ".md", ".html"} if written else {".jsonl"}
    )


def test_the_key_comes_from_the_environment_and_is_not_recorded(output, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "right")
    with serving(FakeServer(api_key="right")) as url:
        assert run_main("--url", url, "--result", str(output)) == 0
    assert "right" not in json.dumps(result_module.read(output)["config"])
    assert "Bearer" not in output.read_text()


def test_a_result_is_not_overwritten(output):
    result = measure(FakeServer(), output, repeats=1)
    with pytest.raises(LoadError, match="a result is written once"):
        result_module.write(output, result)
    with pytest.raises(LoadError, match="a result is written once"):
        measure(FakeServer(), output, repeats=1)


def test_a_result_of_another_schema_version_is_refused(output):
    result = measure(FakeServer(), output, repeats=1)
    output.write_text(json.dumps(result | {"schema_version": 7}))
    with pytest.raises(LoadError, match="schema version 7; this program has 1"):
        result_module.read(output)
