"""Generated long-context items: their length, their needles' places, one exact answer."""

import asyncio
import random
import re
import tracemalloc

import pytest

from bench.eval import longcontext
from bench.eval.items import Verdict, fingerprint
from bench.eval.longcontext import HOPS, Kind
from bench.load.errors import LoadError
from bench.load.prompts import FIT_ROUNDS, FIT_SLACK

ANSWER_TOKENS = 64
STATED = re.compile(r"The number of the ([a-z]+ [a-z]+) is (\d{7})\.")
LINKED = re.compile(r"The ([a-z]+ [a-z]+) has the number of the ([a-z]+ [a-z]+)\.")
ASKED = re.compile(r"What is the number of the ([a-z]+ [a-z]+)\? Answer")


class Counter:
    """Stands for a tokenizer: 4 characters are a token, 5 more are the template's."""

    def __init__(self) -> None:
        self.calls = 0

    async def count(self, text: str) -> int:
        self.calls += 1
        return tokens(text)


def tokens(text: str) -> int:
    return 5 + len(text) // 4


def make(contexts, depths, repeats=1, seed=0, counter=None):
    counter = counter or Counter()
    return asyncio.run(
        longcontext.make_items(
            contexts, depths, repeats, seed, ANSWER_TOKENS, counter.count, lambda _: None
        )
    )


def solved(text: str) -> tuple[str, float]:
    """The answer that a careful reader finds, and where it lies, as a share of the text."""
    body, _, question = text.rpartition("\n\n")
    numbers = {m[1]: m for m in STATED.finditer(body)}
    links = dict(LINKED.findall(body))
    (name,) = ASKED.findall(question)
    while name in links:
        name = links[name]
    return numbers[name][2], numbers[name].start() / len(body)


@pytest.mark.parametrize("context", [8_000, 128_000, 524_000])
def test_items_have_their_length_their_answer_and_its_place(context):
    depths = (0.0, 0.37, 1.0)
    counter = Counter()
    tracemalloc.start()
    try:
        items = make((context,), depths, counter=counter)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(items) == len(Kind) * len(depths)
    for item in items:
        (message,) = item.messages
        text = message["content"]
        room = context - ANSWER_TOKENS
        assert room - FIT_SLACK <= tokens(text) <= room
        answer, place = solved(text)
        assert answer == item.expected
        assert text.count(answer) == 1
        # Sentences of other needles shift it by their own length.
        assert place == pytest.approx(item.extra["depth"], abs=2_000 / len(text))
        assert (item.max_tokens, item.fresh) == (ANSWER_TOKENS, True)
    assert counter.calls <= len(items) * (FIT_ROUNDS + 1)
    # The items, the novels while they are unpacked, and a few copies of one message.
    assert peak < sum(len(i.messages[0]["content"]) for i in items) + (96 << 20)


def test_a_multi_hop_answer_needs_every_link():
    (item,) = [i for i in make((8_000,), (0.5,)) if "multi-hop" in i.id]
    text = item.messages[0]["content"]
    assert len(LINKED.findall(text)) == HOPS
    assert len(STATED.findall(text)) == 1 + longcontext.DISTRACTORS
    (asked,) = ASKED.findall(text)
    assert asked not in dict(STATED.findall(text))


@pytest.mark.parametrize("kind", list(Kind))
def test_the_names_are_not_in_the_novels(kind):
    text = longcontext.corpus.text_for(1 << 30)
    puzzle = longcontext.make_puzzle(kind, 0.5, random.Random(0))
    words = {*longcontext.FIRST, *longcontext.SECOND}
    assert not words & set(re.findall(r"[a-z]+", text.lower()))
    assert puzzle.answer not in text


def test_the_prompt_begins_with_a_nonce_at_any_depth():
    """So two runs share no prefix, whatever lies at depth 0."""
    first, again = (make((8_000,), (0.0,)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        a, b = one.messages[0]["content"], other.messages[0]["content"]
        assert re.match(r"([0-9a-f]{4} ){7}[0-9a-f]{4}\n", a)
        assert a[:39] != b[:39]
        assert (one.id, one.expected) == (other.id, other.expected)
    assert fingerprint(first) == fingerprint(again)


def test_another_seed_asks_otherwise():
    first, other = (make((8_000,), (0.5,), seed=seed) for seed in (0, 1))
    assert [i.expected for i in first] != [i.expected for i in other]
    assert fingerprint(first) != fingerprint(other)


def test_repeats_differ():
    items = make((8_000,), (0.5,), repeats=3)
    assert len({i.expected for i in items}) == len({i.id for i in items}) == 6


def test_a_context_without_room_is_refused():
    with pytest.raises(LoadError, match="an empty chat with its nonce has"):
        make((ANSWER_TOKENS + 100,), (0.5,))


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("4719302", Verdict.CORRECT),
        ("The number is 4,719,302.", Verdict.CORRECT),
        ("<think>1234567</think>It is 4719302.", Verdict.CORRECT),
        ("It is 4719303.", Verdict.WRONG),
        ("4719302 or 1234567", Verdict.INVALID),
        ("It is 47193.", Verdict.INVALID),
        ("I'm sorry, but I can't help with that.", Verdict.REFUSED),
    ],
)
def test_only_the_exact_number_is_right(text, verdict):
    item = longcontext.Item("x", (), "4719302")
    assert asyncio.run(longcontext.score(item, text)).verdict is verdict
