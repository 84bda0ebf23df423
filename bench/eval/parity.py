"""Greedy parity: the same prompts asked without MTP, twice, and with it.

All at temperature 0 and of the same length. The two runs without MTP have different numbers of
prompts at once and are the control: what a batch of another shape does to the texts by itself.
`parity_judge` compares MTP with that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.client import Choices, Client, RequestError
from bench.eval import sources
from bench.load import corpus
from bench.load.counters import Counters
from bench.load.errors import LoadError, ServerUnusable
from bench.load.progress import duration, say
from bench.load.run import session
from bench.load.server import Server, ServerFacts, differing
from bench.measurement import Prompt

LEAST_CHARS, MOST_CHARS = 200, 700
PROGRESS_S = 10.0
# Tokens of each position whose log-probabilities are asked for. More than two: bf16 logits are
# coarse, and three or more tokens can tie.
BEST = 8
OWN_SETS = ("mini_math", "mini_choice", "mini_code")


@dataclass(frozen=True)
class Control:
    """Without MTP: every answer with its best tokens, twice."""

    facts: ServerFacts
    base: tuple[Choices, ...]
    again: tuple[Choices, ...]


@dataclass(frozen=True)
class Speculative:
    """With MTP: token ids of every answer, and what was drafted and accepted meanwhile."""

    facts: ServerFacts
    token_ids: tuple[tuple[int, ...], ...]
    num_drafts: int | None
    num_accepted_tokens: int | None


def default_prompts(count: int) -> list[Prompt]:
    """Our own questions, then paragraphs of a novel, evenly from its whole length."""
    prompts = []
    for name in OWN_SETS:
        for row in sources.own(name)[0]:
            text = row.get("question") or row["prompt"]
            prompts.append(Prompt(str(row.get("id") or row["task_id"]), text))
    paragraphs = [p for p in corpus.novels()[0].splitlines() if LEAST_CHARS <= len(p) <= MOST_CHARS]
    wanted = max(0, count - len(prompts))
    if wanted > len(paragraphs):
        raise LoadError(f"{count} prompts; there are {len(prompts) + len(paragraphs)}")
    step = len(paragraphs) / max(1, wanted)
    picked = [paragraphs[int(i * step)] for i in range(wanted)]
    prompts += [Prompt(f"prose-{i:03d}", text) for i, text in enumerate(picked)]
    return prompts[:count]


async def ask_control(
    url: str, prompts: Sequence[Prompt], max_tokens: int, streams: tuple[int, int],
    timeout_s: float, api_key: str | None = None,
) -> Control:  # fmt: skip
    """Both runs without MTP, with so many prompts at once in each.

    Raises:
        ServerUnusable: a request failed.
        LoadError: the server drafts, or does not tell whether it does.
    """
    async with session(timeout_s, api_key) as opened:
        server = Server(opened, url)
        facts = await server.facts(None)
        _refuse_drafting(url, await server.counters())
        client = Client(opened, url)

        async def ask(prompt: Prompt) -> Choices:
            return await client.choices(facts.model, prompt.text, max_tokens, BEST)

        base, again = [
            await _ask(f"no MTP, {count} at once", prompts, count, ask) for count in streams
        ]
        _refuse_drafting(url, await server.counters())
    return Control(facts, tuple(base), tuple(again))


async def ask_speculative(
    url: str, prompts: Sequence[Prompt], max_tokens: int, streams: int, timeout_s: float,
    api_key: str | None = None, control: ServerFacts | None = None,
) -> Speculative:  # fmt: skip
    """The run with MTP, asked as users ask: streamed, without log-probabilities.

    Args:
        control: of the server without MTP; this one must have the same model.
    Raises:
        ServerUnusable: a request failed, or the server sends no token ids.
        LoadError: it serves another model, window or checkpoint than the control.
    """
    async with session(timeout_s, api_key) as opened:
        server = Server(opened, url)
        facts = await server.facts(None)
        if control is not None:
            _refuse_another(url, facts, control)
        client = Client(opened, url)

        async def ask(prompt: Prompt) -> tuple[int, ...]:
            answer = await client.chat(facts.model, prompt.text, max_tokens)
            if answer.token_ids is None:
                raise RequestError("no token ids in the answer; parity needs vLLM's")
            return answer.token_ids

        before = await server.counters()
        ids = await _ask(f"MTP, {streams} at once", prompts, streams, ask)
        moved = (await server.counters()).since(before)
    return Speculative(facts, tuple(ids), moved.num_drafts, moved.num_accepted_tokens)


def _refuse_drafting(url: str, counters: Counters) -> None:
    if counters == Counters():
        raise LoadError(f"{url}: must be without MTP; its /metrics has no counters to tell that by")
    if counters.num_drafts:
        raise LoadError(f"{url}: must be without MTP; it has {counters.num_drafts} drafts")


def _refuse_another(url: str, facts: ServerFacts, control: ServerFacts) -> None:
    names = ("model", "window", "checkpoint")
    here, there = ({name: one.to_json()[name] for name in names} for one in (facts, control))
    if found := [f"{name} {a}, not {b}" for name, a, b in differing(here, there)]:
        raise LoadError(f"{url}: must be the server without MTP but for MTP: {'; '.join(found)}")


async def _ask(
    name: str, prompts: Sequence[Prompt], streams: int, ask: Callable[[Prompt], Any]
) -> list[Any]:
    """In groups of `streams`, which start together."""
    answers: list[Any] = []
    started = told = time.monotonic()
    for start in range(0, len(prompts), streams):
        group = prompts[start : start + streams]
        try:
            answers += await asyncio.gather(*(ask(prompt) for prompt in group))
        except RequestError as error:
            raise ServerUnusable(f"{name}: {error}") from error
        now = time.monotonic()
        if now - told > PROGRESS_S or len(answers) == len(prompts):
            told = now
            left = (now - started) / len(answers) * (len(prompts) - len(answers))
            say(f"{name}: {len(answers)}/{len(prompts)} prompts, about {duration(left)} left")
    return answers
