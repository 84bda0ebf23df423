"""Events of hand-made streams."""

import gc
import json

import pytest

from bench.load.stream import Stream, undisturbed
from bench.load.summary import accepted_positions, request_figures
from bench.load.trace import Chunk, Kind, Speculation, Trace, from_json, to_json
from tests.bench.load.calls import Calls


def event(**fields) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(content: str, counted: int | None = None) -> bytes:
    fields = {"choices": [{"text": content}]}
    if counted is not None:
        fields["usage"] = {"prompt_tokens": 9, "completion_tokens": counted}
    return event(**fields)


def delta(**fields) -> bytes:
    return event(choices=[{"delta": fields}])


USAGE = event(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 5})
DONE = b"data: [DONE]\n\n"


def read(*parts: bytes) -> Trace:
    stream = Stream()
    for at, part in enumerate(parts, 1):
        stream.feed(part, float(at))
    return stream.trace(0.0, None)


def test_two_tokens_in_a_chunk_are_counted_by_the_running_usage():
    trace = read(text("a", 1), text("bc", 3), text("de", 5), USAGE, DONE)
    assert [c.num_tokens for c in trace.chunks] == [1, 2, 2]
    assert (trace.prompt_tokens, trace.output_tokens, trace.error) == (9, 5, None)


def test_without_a_running_usage_the_tokens_of_a_chunk_are_none():
    assert [c.num_tokens for c in read(text("ab"), text("c"), USAGE, DONE).chunks] == [None, None]


def test_the_role_is_no_token_and_reasoning_is():
    trace = read(
        delta(role="assistant", content=""), delta(reasoning="r"), delta(content="c"), USAGE, DONE
    )
    assert trace.first_s == 2
    assert trace.first_content_s == 3
    assert [c.kind for c in trace.chunks] == [Kind.REASONING, Kind.CONTENT]


def test_a_token_without_text_is_a_token():
    """Half of a character is held back until its other half comes."""
    trace = read(text("", 1), text("ü", 2), USAGE, DONE)
    assert trace.first_s == 1
    assert [c.num_tokens for c in trace.chunks] == [1, 1]


def test_events_may_be_cut_anywhere_or_come_together():
    whole = text("a", 1) + text("b", 2) + USAGE + DONE
    together = read(whole)
    assert [c.at_s for c in together.chunks] == [1, 1]
    apart = read(*(whole[i : i + 7] for i in range(0, len(whole), 7)))
    assert [c.num_tokens for c in apart.chunks] == [1, 1]
    assert apart.error is None


def test_comments_and_unknown_fields_are_no_tokens():
    trace = read(b": keep-alive\n\n", b"event: x\n", text("a", 1), USAGE, DONE)
    assert trace.first_s == 3


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ([text("a", 1), USAGE], "ended before [DONE]"),
        ([USAGE, DONE], "held no token"),
        ([DONE], "held no token"),
        ([], "ended before [DONE]"),
        ([text("a"), DONE], "held no usage"),
        ([text("a", 1), event(error={"message": "out of memory"})], "out of memory"),
        ([text("a", 1), b"data: {oops\n\n"], "malformed stream"),
        ([text("a", 1), b'data: ["list"]\n\n'], "malformed stream"),
    ],
)
def test_a_stream_that_is_not_whole_fails_and_keeps_what_came(parts, error):
    trace = read(*parts)
    assert error in trace.error
    assert request_figures(trace) is None
    assert len(trace.chunks) == sum(b"text" in part for part in parts)


def test_figures_of_a_hand_made_stream():
    chunks = tuple(Chunk(at, n) for at, n in [(1.0, 1), (1.5, 2), (3.0, 2)])
    figures = request_figures(Trace(0.5, chunks, 100, 5, 20))
    assert figures == {
        "ttft_ms": 500,
        "time_to_first_content_ms": 500,
        "tpot_ms": 500,
        "e2el_ms": 2500,
        "prefill_tok_s": 160,
        "decode_tok_s": 2,
    }


def test_one_token_has_no_rate():
    figures = request_figures(Trace(0.0, (Chunk(1.0, 1),), 100, 1, 0))
    assert figures["tpot_ms"] is None
    assert figures["decode_tok_s"] is None


def test_only_reasoning_has_no_time_to_content():
    figures = request_figures(Trace(0.0, (Chunk(1.0, 2, Kind.REASONING),), 100, 2, 0))
    assert figures["ttft_ms"] == 1000
    assert figures["time_to_first_content_ms"] is None


def test_accepted_positions_come_from_histograms():
    # Of 10 drafts of two tokens, 3 had none accepted, 5 one, 2 both.
    assert accepted_positions([Speculation(10, 20, 9, (3, 5, 2))]) == (7, 2)
    assert accepted_positions([Speculation(10, 20, 9, None)]) is None
    assert accepted_positions([]) is None


def test_a_trace_survives_the_journal():
    trace = Trace(
        0.25, (Chunk(0.5, 2, Kind.REASONING), Chunk(0.75, None)), 9, 2, 0, "length",
        Speculation(1, 1, 1, (0, 1)), "late",
    )  # fmt: skip
    assert from_json(json.loads(json.dumps(to_json(trace)))) == trace


def test_no_garbage_collection_runs_between_two_chunks():
    with pytest.raises(KeyError), undisturbed():  # noqa: PT012 - on again after a failure, too
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_parsing_a_chunk_takes_at_most_20_calls():
    """19 on every machine, unlike its time. With aiohttp's reading: `test_client_cost.py`."""
    one = text(" he would", 3)
    streams = [Stream() for _ in range(64)]
    calls = Calls()
    calls.begin()
    for _ in range(100):
        for stream in streams:
            stream.feed(one, 0.0)
    calls.end()
    assert calls.count <= 20 * 6400


def test_an_error_of_null_is_none():
    part = event(choices=[{"text": "a"}], error=None, usage={"completion_tokens": 1})
    assert read(part, DONE).error is None


@pytest.mark.parametrize("done", [b"data: [DONE]", b"data:[DONE]\r"])
def test_the_last_line_need_not_end(done):
    assert read(text("a", 1), USAGE, done).error is None
