"""Greedy parity: does speculative decoding change the text?

The same prompts at temperature 0, of the same length, asked of a server without MTP twice, with
different numbers at once, and of a server with MTP. The first two are the control: a bf16 engine
computes slightly other logits in another batch shape, so texts may part where the two best tokens
are nearly as likely. How far their gap moves by itself is measured over all positions that both
runs reached alike. With MTP a text may part only where the gap is within that, and no more often
than the control's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.client import Choices, Client, RequestError
from bench.eval import sources, stats
from bench.load import corpus
from bench.load.errors import LoadError, ServerUnusable, Unbelievable
from bench.load.progress import duration, say
from bench.load.run import session
from bench.load.server import Server, ServerFacts
from bench.measurement import Prompt
from bench.near_ties import first_difference, gap_noise

LEAST_CHARS, MOST_CHARS = 200, 700
PROGRESS_S = 10.0
# Of the test whether MTP parts more often than the control.
ALPHA = 0.001
OWN_SETS = ("mini_math", "mini_choice", "mini_code")


@dataclass(frozen=True)
class Parting:
    """Where a text leaves the one without MTP. gap: log p of the best token less that of the
    second there; None where the other text's token is neither: that is no near-tie."""

    prompt_id: str
    position: int
    gap: float | None

    def within(self, noise: float) -> bool:
        """Whether the noise explains it."""
        return self.gap is not None and self.gap <= noise


@dataclass(frozen=True)
class Control:
    """Without MTP: every answer with its two best tokens, twice."""

    facts: ServerFacts
    base: tuple[Choices, ...]
    again: tuple[Choices, ...]

    @property
    def noise(self) -> float:
        """Largest change of the gap between the two, in nats."""
        return gap_noise(self.base, self.again)


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
        LoadError: the server drafts.
    """
    async with session(timeout_s, api_key) as opened:
        facts = await Server(opened, url).facts(None)
        client = Client(opened, url)

        async def ask(prompt: Prompt) -> Choices:
            return await client.choices(facts.model, prompt.text, max_tokens)

        base, again = [
            await _ask(f"no MTP, {count} at once", prompts, count, ask) for count in streams
        ]
        counters = await Server(opened, url).counters()
        if counters.num_drafts:
            raise LoadError(f"{url}: must be without MTP; it has {counters.num_drafts} drafts")
    return Control(facts, tuple(base), tuple(again))


async def ask_speculative(
    url: str, prompts: Sequence[Prompt], max_tokens: int, streams: int, timeout_s: float,
    api_key: str | None = None,
) -> Speculative:  # fmt: skip
    """The run with MTP, asked as users ask: streamed, without log-probabilities.

    Raises:
        ServerUnusable: a request failed, or the server sends no token ids.
    """
    async with session(timeout_s, api_key) as opened:
        server = Server(opened, url)
        facts = await server.facts(None)
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


def partings(
    prompts: Sequence[Prompt], base: Sequence[Choices], other: Sequence[Sequence[int]]
) -> list[Parting]:
    """The texts that part from the base's, each where it does."""
    found = []
    for prompt, run, ids in zip(prompts, base, other, strict=True):
        at = first_difference(run.token_ids, ids)
        if at is None and len(ids) != len(run.token_ids):
            found.append(Parting(prompt.id, min(len(ids), len(run.token_ids)), None))
        elif at is not None:
            two = {token for token, _ in run.best[at]}
            known = {run.token_ids[at], ids[at]} == two
            found.append(Parting(prompt.id, at, run.gap(at) if known else None))
    return found


def judge(prompts: Sequence[Prompt], control: Control, speculative: Speculative) -> dict[str, Any]:
    """The figures, and as `problems` what breaks parity."""
    noise = control.noise
    usual = partings(prompts, control.base, [c.token_ids for c in control.again])
    drafted = partings(prompts, control.base, speculative.token_ids)
    beyond = [p for p in drafted if not p.within(noise)]
    parted_mtp = {p.prompt_id for p in drafted}
    parted_control = {p.prompt_id for p in usual}
    p_value = stats.mcnemar(len(parted_mtp - parted_control), len(parted_control - parted_mtp))
    problems = []
    if beyond:
        places = ", ".join(_place(p) for p in beyond[:3])
        problems.append(
            f"{len(beyond)} of {len(prompts)} texts part where the best token is clear, beyond the "
            f"control's noise of {noise:.4f}: {places}"
        )
    if len(parted_mtp) > len(parted_control) and p_value < ALPHA:
        problems.append(
            f"{len(parted_mtp)} texts part, {len(parted_control)} in the control, p = {p_value:.2g}"
        )
    if not speculative.num_drafts:
        problems.append("the server with MTP drafted nothing: this says nothing about MTP")
    return {
        "n": len(prompts),
        "noise": noise,
        "control": _side(prompts, usual, noise),
        "mtp": _side(prompts, drafted, noise),
        "p": p_value,
        "num_drafts": speculative.num_drafts,
        "num_accepted_tokens": speculative.num_accepted_tokens,
        "problems": problems,
    }


def check(result: dict[str, Any]) -> None:
    """Refuse a result that shows no parity.

    Raises:
        Unbelievable: with its problems.
    """
    if result["problems"]:
        raise Unbelievable("no parity: " + "; ".join(result["problems"]))


def _side(prompts: Sequence[Prompt], found: Sequence[Parting], noise: float) -> dict[str, Any]:
    n, same = len(prompts), len(prompts) - len(found)
    interval = stats.wilson(same, n)
    return {
        "num_identical": same,
        "share_identical": same / n if n else None,
        "interval": list(interval) if interval else None,
        "partings": [asdict(p) | {"near_tie": p.within(noise)} for p in found],
    }


def _place(parting: Parting) -> str:
    gap = "not among the two best" if parting.gap is None else f"gap {parting.gap:.3f}"
    return f"{parting.prompt_id} at token {parting.position} ({gap})"


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
