"""What a run must not print as good: cold prompts called warm, a server that others use too."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from bench.load import run as run_module
from bench.load import server as server_module
from bench.load.config import Api, LoadConfig, Mode
from bench.load.errors import LoadError, Unbelievable
from bench.load.server import Server
from tests.bench.load.fake_server import FakeServer, serving

CONFIG = LoadConfig(depths=(600,), output=9, repeats=2, max_warm_up_rounds=0)
GAUGE = 'vllm:num_requests_{}{{engine="0",model_name="fake"}} {}\n'


@pytest.fixture
def output(tmp_path):
    return tmp_path / "load.json"


def measure(server: FakeServer, output, **changes) -> dict:
    with serving(server) as url:
        return run_module.run(replace(CONFIG, url=url, **changes), output)["cells"][0]


def measured_badly(server: FakeServer, output, **changes) -> str:
    with pytest.raises(Unbelievable) as caught:
        measure(server, output, **changes)
    assert json.loads(output.read_text())["cells"][0]["problems"]
    return str(caught.value)


def with_page(server: FakeServer, change: Callable[[str], str]) -> FakeServer:
    page = server.page
    server.page = lambda: change(page())
    return server


def cache_off() -> FakeServer:
    off = 'enable_prefix_caching="False"'
    return with_page(
        FakeServer(cache=False), lambda p: p.replace('enable_prefix_caching="True"', off)
    )


@pytest.mark.parametrize("mode", [Mode.WARM, Mode.FOLLOWUP])
def test_a_cache_that_is_off_is_not_measured(output, mode):
    server = cache_off()
    with serving(server) as url:
        config = replace(CONFIG, url=url, mode=mode)
        with pytest.raises(LoadError, match=f"mode {mode}: the server's prefix cache is off"):
            run_module.run(config, output)
        with pytest.raises(LoadError, match=f"mode {mode}: the server's prefix cache is off"):
            run_module.rehearse(config, None)
    assert server.bodies == []


def test_cold_prompts_need_no_cache(output):
    assert measure(cache_off(), output)["problems"] == []


@pytest.mark.parametrize("mode", [Mode.WARM, Mode.FOLLOWUP])
def test_without_cached_tokens_in_usage_the_counters_tell_of_warm_prompts(output, mode):
    cell = measure(FakeServer(cached_details=False), output, mode=mode, depths=(3000,))
    assert cell["cache"]["contaminated"] is False
    assert cell["cache"]["largest_cached_share"] > 0.6
    output.unlink()
    cold = FakeServer(cached_details=False, cache=False)
    message = measured_badly(cold, output, mode=mode, depths=(3000,))
    assert "0.0% of a prompt at most came from the prefix cache" in message


def test_a_short_warm_prompt_of_which_nothing_was_cached_is_not_warm(output):
    message = measured_badly(FakeServer(cache=False), output, mode=Mode.WARM, depths=(100,))
    assert "0.0% of a prompt at most" in message


def test_where_nothing_tells_a_warm_run_is_not_believed(output):
    server = FakeServer(cached_details=False, metrics_page=False)
    message = measured_badly(server, output, mode=Mode.WARM)
    assert "mode warm: the server does not tell what came from its prefix cache" in message


def test_prefills_of_others_are_noticed(output):
    server = FakeServer()
    own = server.count

    def count(tokens: int, chunks: int) -> dict | None:
        server.queries += 50  # somebody's prompt was begun, and has no token yet
        return own(tokens, chunks)

    server.count = count
    message = measured_badly(server, output)
    assert "other traffic: the engine took in 1300 prompt tokens and this run sent 1200" in message


def test_drafts_of_others_are_noticed(output):
    server = FakeServer(num_speculative_tokens=1, tokens_per_chunk=2)
    own = server.count

    def count(tokens: int, chunks: int) -> dict | None:
        server.accepted += 1
        return own(tokens, chunks)

    server.count = count
    message = measured_badly(server, output)
    assert "the engine accepted other drafts than those of this run's requests" in message


@pytest.mark.parametrize("state", ["running", "waiting"])
def test_requests_that_the_engine_has_before_a_round_are_noticed(output, monkeypatch, state):
    monkeypatch.setattr(server_module, "SETTLE_S", 0.0)
    server = with_page(FakeServer(), lambda page: page + GAUGE.format(state, 1.0))
    message = measured_badly(server, output)
    assert "other traffic: the engine had 1 requests before a round began" in message


def test_a_gauge_that_is_late_is_waited_for(output, monkeypatch):
    monkeypatch.setattr(server_module, "SETTLE_S", 60.0)
    late = itertools.cycle((1.0, 1.0, 0.0))
    server = with_page(FakeServer(), lambda page: page + GAUGE.format("running", next(late)))
    cell = measure(server, output)
    assert [done["others"] for done in cell["rounds"]] == [0, 0]
    assert cell["problems"] == []


def test_where_no_gauge_tells_nothing_is_claimed(output):
    assert [done["others"] for done in measure(FakeServer(), output)["rounds"]] == [None, None]


def test_preemptions_are_said(output):
    number = itertools.count()
    server = with_page(
        FakeServer(),
        lambda page: page.replace(
            'num_preemptions_total{engine="0",model_name="fake"} 0.0',
            f'num_preemptions_total{{engine="0",model_name="fake"}} {next(number)}.0',
        ),
    )
    assert measure(server, output)["problems"] == []
    assert "The engine preempted requests 2 times" in output.with_suffix(".md").read_text()


def test_a_chat_of_another_length_than_was_fitted_fails(output, monkeypatch):
    real = Server.count_chat

    async def count_more(self, model: str, text: str) -> int:
        return await real(self, model, text) + 20

    monkeypatch.setattr(Server, "count_chat", count_more)
    message = measured_badly(FakeServer(), output, api=Api.CHAT)
    assert "prompt tokens; 600 were sent, or up to 8 fewer" in message
