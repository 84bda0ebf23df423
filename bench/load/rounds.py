"""One round: as many requests at once as the cell has streams, between two counter readings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.load import counters, stream, trace
from bench.load.config import FOLLOW_UP_TOKENS, Api, Cell, LoadConfig, Mode
from bench.load.counters import Counters
from bench.load.errors import ServerUnusable
from bench.load.prompts import FIT_SLACK
from bench.load.server import Server
from bench.load.telemetry import Telemetry
from bench.load.trace import Trace

PRIME_OUTPUT = 1
# Fields of a round that are in JSON as they are.
PLAIN = ("cell", "repeat", "primed_tokens", "energy_j", "sm_clock_mhz")

# make(tokens, purpose) -> token ids or a chat's text
MakePrompt = Callable[[int, str], Awaitable[list[int] | str]]


@dataclass(frozen=True)
class Round:
    """What came of one repeat of one cell.

    primed_tokens: of each prompt, how many were sent before it was measured. energy_j: of all
    GPUs, from the first request sent to the last token. sm_clock_mhz: low, median and high.
    others: requests that the engine had before the first was sent; None where it does not tell.
    """

    cell: int
    repeat: int
    traces: tuple[Trace, ...]
    counters: Counters
    primed_tokens: int
    wall_s: float
    energy_j: float | None = None
    throttle_reasons: tuple[str, ...] | None = None
    sm_clock_mhz: dict[str, float] | None = None
    others: int | None = None


def to_json(done: Round) -> dict[str, Any]:
    """Plain values."""
    return {
        **{k: getattr(done, k) for k in PLAIN},
        "throttle_reasons": done.throttle_reasons and list(done.throttle_reasons),
        "wall_s": round(done.wall_s, 6),
        "others": done.others,
        "counters": asdict(done.counters),
        "requests": [trace.to_json(t) for t in done.traces],
    }


def from_json(record: dict[str, Any]) -> Round:
    """Undo `to_json`."""
    return Round(
        **{k: record[k] for k in (*PLAIN, "wall_s")},
        throttle_reasons=record["throttle_reasons"] and tuple(record["throttle_reasons"]),
        counters=counters.from_json(record["counters"]),
        others=record.get("others"),
        traces=tuple(trace.from_json(t) for t in record["requests"]),
    )


@dataclass(frozen=True)
class Runner:
    """Sends rounds to one server."""

    server: Server
    model: str
    config: LoadConfig
    make: MakePrompt
    telemetry: Telemetry

    async def run(self, number: int, cell: Cell, repeat: int) -> Round:
        """Measure one repeat of a cell, after priming where the mode asks for it.

        Raises:
            ServerUnusable: the server does not answer any more, or its engine restarted.
        """
        purposes = [f"{cell.depth}/{cell.streams}/{repeat}/{s}" for s in range(cell.streams)]
        prompts = [await self.make(cell.depth, purpose) for purpose in purposes]
        primed = 0
        if self.config.mode is not Mode.COLD:
            primed = await self._prime(prompts, cell)
        return await self._measure(number, cell, repeat, prompts, primed)

    async def warm_up(self, cell: Cell, attempt: int, output: int) -> list[Trace]:
        """Send a round with prompts that no measured one shares, not to be reported."""
        purposes = [f"warm-up/{attempt}/{s}" for s in range(cell.streams)]
        prompts = [await self.make(cell.depth, purpose) for purpose in purposes]
        return await self._send(self._encoded(prompts, output))

    async def _prime(self, prompts: list[list[int] | str], cell: Cell) -> int:
        """Send what shall be in the cache; returns tokens of each prompt that were."""
        primed = cell.depth
        if self.config.mode is Mode.FOLLOWUP:
            primed = max(cell.depth // 2, cell.depth - FOLLOW_UP_TOKENS)
        parts = [p if self.config.mode is Mode.WARM else p[:primed] for p in prompts]
        for sent in await self._send(self._encoded(parts, PRIME_OUTPUT)):
            if sent.error:
                raise ServerUnusable(f"priming the cache: {sent.error}")
        return primed

    async def _measure(
        self, number: int, cell: Cell, repeat: int, prompts: list[list[int] | str], primed: int
    ) -> Round:
        bodies = self._encoded(prompts, self.config.output)
        before, others = await self.server.settled()
        started = time.monotonic()
        async with self.telemetry.watching() as watch:
            start_s = time.perf_counter()  # after the first sample, however long NVML took
            traces = await self._send(bodies, start_s)
        wall_s = time.monotonic() - started
        if not await self.server.is_up():
            failed = next((t.error for t in traces if t.error), "no answer")
            raise ServerUnusable(f"the server went away during a round: {failed}")
        try:
            moved = (await self.server.settled())[0].since(before)
        except ValueError as error:
            raise ServerUnusable(str(error)) from error
        checked = tuple(self._checked(t, cell) for t in traces)
        return Round(
            number, repeat, checked, moved, primed, wall_s,
            energy_j=watch.energy_j(checked, start_s),
            throttle_reasons=watch.throttle_reasons(), sm_clock_mhz=watch.sm_clock_mhz(),
            others=others,
        )  # fmt: skip

    def _encoded(self, prompts: list[list[int] | str], output: int) -> list[bytes]:
        return [stream.encode(request_body(self.model, prompt, output)) for prompt in prompts]

    async def _send(self, bodies: list[bytes], start_s: float | None = None) -> list[Trace]:
        start_s = time.perf_counter() if start_s is None else start_s
        route = "/v1/chat/completions" if self.config.api is Api.CHAT else "/v1/completions"
        session, url = self.server.session, self.server.url + route
        with stream.undisturbed():
            return list(
                await asyncio.gather(*(stream.send(session, url, body, start_s) for body in bodies))
            )

    def _checked(self, sent: Trace, cell: Cell) -> Trace:
        """A request whose lengths are not those of the plan has failed."""
        if sent.error:
            return sent
        if sent.output_tokens != self.config.output:
            error = f"{sent.output_tokens} output tokens; {self.config.output} were asked for"
            return replace(sent, error=error)
        slack = FIT_SLACK if self.config.api is Api.CHAT else 0
        if sent.prompt_tokens not in range(cell.depth - slack, cell.depth + 1):
            error = f"the server counted {sent.prompt_tokens} prompt tokens; {cell.depth} were sent"
            error += f", or up to {slack} fewer" if slack else ""
            return replace(sent, error=error)
        return sent


def request_body(model: str, prompt: list[int] | str, output: int) -> dict[str, Any]:
    """A greedy streaming request of fixed length: a completion of ids, or a chat of a text."""
    asked: dict[str, Any] = {"prompt": prompt}
    if isinstance(prompt, str):
        asked = {"messages": [{"role": "user", "content": prompt}]}
    # The running count tells the tokens of each chunk. Token ids would too, but bring the prompt's
    # ids back with the first token.
    options = {"include_usage": True, "continuous_usage_stats": True}
    return asked | {
        "model": model,
        "max_tokens": output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": options,
    }
