import asyncio

import aiohttp
import pytest

from bench.client import Client, Completion, RequestError
from tests.bench.fake_openai import FakeEngine, fake_openai


def ask(engine: FakeEngine, max_tokens: int = 8) -> Completion:
    async def one(url: str) -> Completion:
        async with aiohttp.ClientSession() as session:
            client = Client(session, url)
            return await client.chat(await client.model_name(), "hello", max_tokens)

    with fake_openai(engine) as url:
        return asyncio.run(one(url))


def test_a_completion_carries_text_tokens_and_times():
    engine = FakeEngine()
    done = ask(engine)
    assert list(done.token_ids) == engine.answer("hello", 8)
    assert done.text == "".join(chr(97 + t) for t in done.token_ids)
    assert done.output_tokens == 8
    assert done.finish_reason == "length"
    assert 0 < done.ttft_ms < done.e2el_ms


def test_requests_are_greedy_of_fixed_length_and_ask_for_usage():
    engine = FakeEngine()
    ask(engine)
    body = engine.bodies[0]
    assert body["temperature"] == 0
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_tokens_are_counted_by_usage_where_a_chunk_carries_several():
    assert ask(FakeEngine(num_speculative_tokens=1, accept_every=1)).output_tokens == 8


def test_without_token_ids_there_are_none():
    assert ask(FakeEngine(token_ids=False)).token_ids is None


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (FakeEngine(status=503), "HTTP 503"),
        (FakeEngine(error_after=2), "engine died"),
        (FakeEngine(usage=False), "no usage"),
    ],
)
def test_a_failed_request_is_an_error(engine, message):
    with pytest.raises(RequestError, match=message):
        ask(engine)


def test_an_empty_stream_is_an_error():
    with pytest.raises(RequestError, match="no token"):
        ask(FakeEngine(), max_tokens=0)


def test_a_server_that_is_not_there_is_an_error():
    async def one() -> None:
        async with aiohttp.ClientSession() as session:
            await Client(session, "http://127.0.0.1:9").counters()

    with pytest.raises(RequestError, match="GET /metrics"):
        asyncio.run(one())
