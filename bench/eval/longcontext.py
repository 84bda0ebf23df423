"""Retrieval and multi-hop questions in long texts, generated: no data set, exact answers.

A text of novels is cut to the wanted number of tokens by the server's own count, with sentences
put between its own. One kind asks for a number behind a name, among the same kind of sentences
about other names; the other has to follow from name to name. The text starts with a nonce, so that
no prompt is in the prefix cache.
"""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bench.eval import extract
from bench.eval.items import Item, Judged, Verdict
from bench.load import corpus
from bench.load.prompts import ChatPrompts
from bench.load.sizes import format_size

CHARS_PER_TOKEN = 6  # more than English has, so that the text suffices
NUMBER = r"\b\d{7}\b"
DISTRACTORS = 7
HOPS = 3
# Words that the novels do not have.
FIRST = ("cobalt", "mauve", "violet", "cyan", "maroon", "indigo", "teal", "ochre", "magenta",
         "umber", "sepia", "turquoise")  # fmt: skip
SECOND = ("falcon", "otter", "lynx", "heron", "badger", "walrus", "gecko", "bison", "ibis",
          "marmot", "puffin", "tapir")  # fmt: skip


class Kind(StrEnum):
    """What has to be done with the text."""

    RETRIEVAL = "retrieval"
    MULTI_HOP = "multi-hop"


@dataclass(frozen=True)
class Puzzle:
    """Sentences with their place as a share of the text, a question, and its answer."""

    sentences: tuple[tuple[float, str], ...]
    question: str
    answer: str


def make_puzzle(kind: Kind, depth: float, rng: random.Random) -> Puzzle:
    """One puzzle whose needed sentence, of several the last, lies at `depth`."""
    pairs = [f"{a} {b}" for a in FIRST for b in SECOND]
    names = rng.sample(pairs, 1 + DISTRACTORS + HOPS)
    numbers = rng.sample(range(1_000_000, 10_000_000), len(names))
    if kind is Kind.RETRIEVAL:
        asked, answer = names[0], str(numbers[0])
        sentences = [(depth, f"The number of the {asked} is {answer}.")]
        question = f"What is the number of the {asked}?"
        others = range(1, 1 + DISTRACTORS)
    else:
        chain, answer = names[: HOPS + 1], str(numbers[HOPS])
        links = [
            f"The {a} has the number of the {b}." for a, b in zip(chain, chain[1:], strict=False)
        ]
        # The hops before the last lie anywhere, in any order.
        sentences = [(rng.random(), link) for link in links]
        sentences.append((depth, f"The number of the {chain[-1]} is {answer}."))
        question = f"What is the number of the {chain[0]}?"
        others = range(HOPS + 1, HOPS + 1 + DISTRACTORS)
    sentences += [(rng.random(), f"The number of the {names[i]} is {numbers[i]}.") for i in others]
    return Puzzle(tuple(sentences), question, answer)


def render(puzzle: Puzzle, text: str) -> str:
    """The whole message: the text with the sentences at their places, then the question.

    Depth 0 is behind the text's first line, its nonce.
    """
    placed = sorted(puzzle.sentences)
    start = text.find("\n") + 1
    cuts = [_word_end(text, start + round(share * (len(text) - start))) for share, _ in placed]
    parts, last = [], 0
    for cut, (_, sentence) in zip(cuts, placed, strict=True):
        parts += [text[last:cut], f" {sentence} "]
        last = cut
    parts.append(text[last:])
    joined = "".join(parts)
    return (
        f"{joined}\n\nSome sentences above tell the numbers of animals, which have nothing to do "
        f"with the story. {puzzle.question} Answer with the number of seven digits."
    )


async def make_items(
    contexts: Sequence[int],
    depths: Sequence[float],
    repeats: int,
    seed: int,
    answer_tokens: int,
    count: Callable[[str], Awaitable[int]],
    say: Callable[[str], None],
) -> list[Item]:
    """Both kinds at every context and depth, `repeats` of each.

    Args:
        contexts: prompt and answer together, in tokens. count: of a chat with one message.
    Raises:
        LoadError: a context has no room for its puzzle.
    """
    items = []
    for context in contexts:
        text = corpus.text_for(context * CHARS_PER_TOKEN)
        for kind in Kind:
            for depth in depths:
                for repeat in range(repeats):
                    name = f"{format_size(context)}/{kind.value}/{depth:.2f}/{repeat}"
                    say(f"long: making {name}")
                    rng = random.Random(f"{seed}/{name}")
                    puzzle = make_puzzle(kind, depth, rng)
                    maker = ChatPrompts(text, seed, lambda inner, p=puzzle: count(render(p, inner)))
                    inner = await maker.make(context - answer_tokens, name)
                    message = {"role": "user", "content": render(puzzle, inner)}
                    group = f"{format_size(context)} {kind.value}"
                    items.append(
                        Item(name, (message,), puzzle.answer, group, {"depth": depth},
                             max_tokens=answer_tokens, fresh=True)
                    )  # fmt: skip
    return items


async def score(item: Item, text: str) -> Judged:
    """Exact match of the seven digits."""
    found = extract.word(re.sub(r"(?<=\d)[, ](?=\d{3})", "", text), NUMBER)
    if found.value is None:
        refused = extract.is_refusal(text)
        return Judged(Verdict.REFUSED if refused else Verdict.INVALID, None, found.how)
    right = found.value == item.expected
    return Judged(Verdict.CORRECT if right else Verdict.WRONG, found.value, found.how)


def _word_end(text: str, at: int) -> int:
    """The end of a word, at `at` or behind it."""
    while 0 < at < len(text) and not text[at].isspace():
        at += 1
    return at
