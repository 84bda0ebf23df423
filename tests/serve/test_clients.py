"""The real `openai` and `anthropic` clients, through the gateway, to the real CPU engine."""

import json

import anthropic
import openai
import pytest

from tests.serve import test_engine
from tests.serve.dashboard import metric_names, page_names, targets
from tests.serve.front_process import wait_until
from tests.serve.test_dashboard import VLLM_NAMES
from tests.serve.test_engine import MODEL
from tests.serve.test_log import requests_of

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# One engine for this file.
front, ready, client = test_engine.front, test_engine.ready, test_engine.client
MESSAGES = [{"role": "user", "content": "The sea"}]
PROMPT = {"model": MODEL, "prompt": "The sea", "max_tokens": 8, "temperature": 0}
CHAT = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
RESPONSE = {"model": MODEL, "input": "The sea", "max_output_tokens": 8, "temperature": 0}
# The Anthropic client has no argument for a temperature.
MESSAGE = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "extra_body": {"temperature": 0}}
CITIES = ["Oslo", "Rome"]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}},
    "required": ["city"],
    "additionalProperties": False,
}
NAMED = {"name": "weather"}
# `strict`: vLLM holds the arguments to their schema. Its grammar lets blanks stand between them,
# and a model this small writes blanks for ever, unless each makes the next less likely.
TOOL = {
    "type": "function",
    "function": NAMED | {"description": "The weather.", "parameters": WEATHER, "strict": True},
}
FORCED = CHAT | {"tools": [TOOL], "max_tokens": 400, "frequency_penalty": 2}


@pytest.fixture
def claude(ready):
    with anthropic.Anthropic(
        base_url=f"http://127.0.0.1:{ready.port}", api_key="x", max_retries=0, timeout=60
    ) as claude:
        yield claude


def test_the_model_is_listed(ready, client):
    [model] = client.models.list()
    assert (model.id, model.max_model_len) == (MODEL, 4096)


def test_a_streamed_chat_is_the_whole_one_in_parts_with_usage(ready, client):
    whole = client.chat.completions.create(**CHAT)
    assert whole.usage.completion_tokens == 8
    events = list(
        client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    )
    *parts, last = events
    assert len(parts) > 2
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content != ""
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage.completion_tokens == 8
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(part.usage is None for part in parts)


def test_n_streams_are_told_apart(ready, client):
    asked = PROMPT | {"n": 2, "temperature": 1, "seed": 3}
    whole = client.completions.create(**asked)
    assert whole.usage.completion_tokens == 16
    texts = {0: "", 1: ""}
    for event in client.completions.create(**asked, stream=True):
        texts[event.choices[0].index] += event.choices[0].text
    assert all(texts.values())
    assert texts[0] != texts[1]
    chat = client.chat.completions.create(**(CHAT | {"n": 2, "temperature": 1}))
    assert [choice.index for choice in chat.choices] == [0, 1]


def test_a_stop_sequence_ends_the_answer_and_is_not_in_it(ready, client, claude):
    free = client.completions.create(**(PROMPT | {"max_tokens": 40})).choices[0].text
    stop = free[5:8]
    stopped = client.completions.create(**(PROMPT | {"max_tokens": 40}), stop=[stop])
    [choice] = stopped.choices
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert choice.text == free[: free.index(stop)]
    words = client.chat.completions.create(**CHAT).choices[0].message.content
    other = claude.messages.create(**MESSAGE, stop_sequences=[words[2:4]])
    assert (other.stop_reason, other.stop_sequence) == ("stop_sequence", words[2:4])
    assert other.content[0].text == words[: words.index(words[2:4])]


def test_log_probabilities_come_for_each_token(ready, client):
    """Greedy: the token that was taken is the likeliest."""
    chat = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    entries = chat.choices[0].logprobs.content
    assert len(entries) == 8
    for entry in entries:
        assert len(entry.top_logprobs) >= 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0
    text = client.completions.create(**PROMPT, logprobs=2, echo=True)
    logprobs = text.choices[0].logprobs
    assert text.choices[0].text.endswith(client.completions.create(**PROMPT).choices[0].text)
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == text.usage.total_tokens
    assert logprobs.token_logprobs[0] is None


def test_the_responses_api_answers_whole_and_in_events(ready, client):
    whole = client.responses.create(**RESPONSE)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert whole.usage.output_tokens == 8
    events = list(client.responses.create(**RESPONSE, stream=True))
    kinds = [event.type for event in events]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == whole.output_text != ""
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.responses.create(**(RESPONSE | {"model": "other"}))


def test_messages_come_whole_and_in_events(ready, client, claude):
    whole = claude.messages.create(**MESSAGE)
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 8)
    counted = claude.messages.count_tokens(model=MODEL, messages=MESSAGES)
    assert counted.input_tokens == whole.usage.input_tokens
    with claude.messages.stream(**MESSAGE) as stream:
        kinds = [event.type for event in stream]
        last = stream.get_final_message()
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("content_block_delta") > 1
    assert last.content[0].text == whole.content[0].text
    assert last.usage.output_tokens == 8
    chat = client.chat.completions.create(**CHAT)
    assert whole.content[0].text == chat.choices[0].message.content


def test_a_tool_is_told_and_may_be_called(ready, client):
    """A model this small calls none of its own will."""
    plain = client.chat.completions.create(**CHAT)
    for choice in ("none", "auto"):
        answer = client.chat.completions.create(**CHAT, tools=[TOOL], tool_choice=choice)
        assert answer.choices[0].message.content
        assert not answer.choices[0].message.tool_calls
        assert answer.usage.prompt_tokens > plain.usage.prompt_tokens + 20


def test_a_tool_call_that_is_forced_is_well_formed(ready, client):
    whole = client.chat.completions.create(**FORCED, tool_choice="required")
    call = whole.choices[0].message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments)["city"] in CITIES
    named = {"type": "function", "function": NAMED}
    events = client.chat.completions.create(**FORCED, tool_choice=named, stream=True)
    choices = [event.choices[0] for event in events]
    parts = [part.function for choice in choices for part in choice.delta.tool_calls or []]
    assert [part.name for part in parts if part.name] == ["weather"]
    assert json.loads("".join(part.arguments or "" for part in parts))["city"] in CITIES
    assert choices[-1].finish_reason != "length"


def test_a_tool_that_a_message_must_use_is_called_in_full(ready, claude):
    """No penalty can be asked for here: hot enough, the blanks end in every second answer."""
    about = {"description": "The weather.", "input_schema": WEATHER, "strict": True}
    asked = MESSAGE | {"max_tokens": 400, "tools": [NAMED | about]}
    asked |= {"tool_choice": {"type": "tool", "name": "weather"}}
    asked |= {"extra_body": {"temperature": 2}}

    def streamed():
        with claude.messages.stream(**asked) as stream:
            return stream.get_final_message()

    for answer in (lambda: claude.messages.create(**asked), streamed):
        answers = (answer() for _ in range(12))
        whole = next(found for found in answers if found.stop_reason != "max_tokens")
        assert whole.stop_reason == "tool_use"
        [used] = [block for block in whole.content if block.type == "tool_use"]
        assert used.name == "weather"
        assert used.id
        assert used.input["city"] in CITIES


def test_what_a_request_lets_it_think_is_no_part_of_the_answer(ready, client):
    """The tiny model never ends a thought."""
    asked = CHAT | {"extra_body": {"chat_template_kwargs": {"thinking": True}}}
    message = client.chat.completions.create(**asked).choices[0].message
    assert message.reasoning
    assert not message.content
    plain = client.chat.completions.create(**CHAT).choices[0].message
    assert plain.content
    assert not plain.reasoning


def test_errors_have_the_clients_own_classes(ready, client, claude):
    other = {"model": "other"}
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(**(CHAT | other))
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        list(client.chat.completions.create(**(CHAT | other), stream=True))
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        claude.messages.create(**(MESSAGE | other))
    bad = ({"messages": "no list"}, {"temperature": -5}, {"n": 0}, {"max_tokens": 10**6})
    for change in bad:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**(CHAT | change))
        assert caught.value.body["message"]
    role = {"messages": [{"role": "king", "content": "x"}]}
    for change in (role, {"max_tokens": 10**6}):
        with pytest.raises(anthropic.BadRequestError) as error:
            claude.messages.create(**(MESSAGE | change))
        assert error.value.body["error"]["message"]
    assert client.completions.create(**PROMPT).usage.completion_tokens == 8


def test_a_request_is_called_as_its_client_says_and_the_log_knows_the_engines_name(
    ready, client, claude
):
    """In the head, else in the body, as without the gateway; else each has an id of its own."""
    head = {"X-Request-Id": "from-the-head"}
    body = {"request_id": "from-the-body"}
    chat, text = client.chat.completions.create, client.completions.create
    assert chat(**CHAT, extra_body=body).id == "chatcmpl-from-the-body"
    assert text(**PROMPT, extra_body=body).id == "cmpl-from-the-body"
    assert chat(**CHAT, extra_body=body, extra_headers=head).id == "chatcmpl-from-the-head"
    assert chat(**CHAT, extra_headers=head).id == "chatcmpl-from-the-head"
    assert chat(**CHAT).id != chat(**CHAT).id

    def known(answer):
        return next((r for r in requests_of(ready) if r.get("engine_id") == answer), None)

    streamed = {chunk.id for chunk in chat(**CHAT, stream=True)}
    whole = {client.responses.create(**RESPONSE).id, claude.messages.create(**MESSAGE).id}
    for answer in streamed | whole:
        line = wait_until(lambda answer=answer: known(answer), f"the line of {answer}")
        assert line["id"].startswith("req-")
    [line] = [r for r in requests_of(ready) if r.get("engine_id") == "cmpl-from-the-body"]
    assert line["path"] == "/v1/completions"
    named = [r["engine_id"] for r in requests_of(ready) if r["id"] == "from-the-head"]
    assert named == ["chatcmpl-from-the-head"] * 2


def test_what_drafts_do_not_allow_is_refused_and_the_engine_lives(ready, client):
    scoring = {"model": MODEL, "query": "The", "items": [" sea"], "label_token_ids": [100, 200]}
    headers = {"Content-Type": "application/json"}
    status, _, body = ready.ask("POST", "/generative_scoring", scoring, headers)
    assert status == 400
    assert b"logprob_token_ids is not yet supported with speculative decoding" in body
    assert client.completions.create(**PROMPT).usage.completion_tokens == 8


def test_what_drafts_verify_is_sampled_as_asked(ready, client):
    """The best token alone may be taken, at any temperature; it may tie with another."""

    def short_of_best(temperature, **extra):
        """By how much the log probability of a taken token falls short of the best one's."""
        job = PROMPT | {"max_tokens": 40, "temperature": temperature, "logprobs": 1}
        taken = client.completions.create(**job, extra_body=extra).choices[0].logprobs
        tops = [max(top.values()) for top in taken.top_logprobs]
        return max(top - own for top, own in zip(tops, taken.token_logprobs, strict=True))

    assert short_of_best(2) > 0.25
    assert short_of_best(2, top_k=1) == 0
    assert short_of_best(2, top_p=1e-6) == 0
    assert short_of_best(1e-3) < 0.25  # vLLM takes 0.01: the chance of more is e^-25
    usual = {"top_p": 0.9, "seed": 1, "top_k": 40, "repetition_penalty": 1.2}
    assert short_of_best(0.7, **usual) > 0


def test_the_status_counts_them_and_shows_the_head_at_work(ready, client):
    """Drafts of the tiny model's MTP head are accepted, and no fault was seen."""
    client.completions.create(**(PROMPT | {"max_tokens": 200}), extra_body={"ignore_eos": True})

    def status():
        return json.loads(ready.ask("GET", "/status.json")[2])

    seen = wait_until(lambda: (now := status())["mtp"]["accepted_tokens"] and now, "acceptance")
    mtp = seen["mtp"]
    assert 0 < mtp["accepted_tokens"] <= mtp["drafted_tokens"]
    assert mtp["per_position"][0] > 0
    assert mtp["acceptance_length"] > 1
    assert not mtp["fault"]
    assert [fault for fault in seen["faults"] if fault["active"]] == []
    assert seen["requests"]["ended"]["done"] > 0
    page = ready.ask("GET", "/metrics")[2].decode()
    [line] = [x for x in page.splitlines() if x.startswith("dsv4_serve_mtp_acceptance_ratio{")]
    assert float(line.split()[-1]) > 0


def test_what_the_dashboard_asks_of_vllm_is_on_its_page(ready, client):
    """And so is every name that the dashboard's own test takes for vLLM's."""
    client.completions.create(**PROMPT)
    page = page_names(ready.ask("GET", "/metrics")[2].decode())
    asked = set().union(*(metric_names(target["expr"]) for _, target in targets()))
    assert len([name for name in asked if name.startswith("vllm:")]) > 10
    assert {name for name in asked if name.startswith("vllm:")} <= page
    assert set(VLLM_NAMES) <= page
