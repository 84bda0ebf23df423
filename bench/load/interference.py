"""`python -m bench interference`: what a long prompt's prefill does to short requests beside it.

A stream decodes. At its first token a long prompt is sent, and a little later a newcomer, a short
request. The other arm is the same without the long prompt. The arms take turns, repeat by repeat.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from bench import metrics
from bench.load import intervals, markdown, origin, stream, trace
from bench.load import run as run_module
from bench.load.config import Cell, LoadConfig
from bench.load.errors import LoadError, ServerUnusable, Unbelievable
from bench.load.progress import say
from bench.load.rounds import Runner, request_body
from bench.load.server import Server
from bench.load.summary import request_figures
from bench.load.telemetry import Telemetry
from bench.load.trace import Trace
from bench.load.warmup import warm_up
from bench.report import write_result

SCHEMA_VERSION = 1
KIND = "interference"
LEAD_S = 0.05  # from the long prompt to the newcomer
LONG_OUTPUT = 2
FIGURES = ("newcomer_ttft_ms", "stream_tpot_ms", "stream_longest_gap_ms")


@dataclass(frozen=True)
class Sizes:
    """Tokens: of the long prompt, of the short ones, and of the stream's answer."""

    long: int
    short: int
    output: int

    def check(self, window: int) -> None:
        """Refuse what the server cannot hold.

        Raises:
            LoadError: a prompt and its answer are over the window.
        """
        for name, total in (("long", self.long + LONG_OUTPUT), ("short", self.short + self.output)):
            if total > window:
                raise LoadError(f"{name}: {total} tokens with its answer; the window is {window}")


@dataclass(frozen=True)
class Scene:
    """One repeat of one arm. long is None where none was sent."""

    stream: Trace
    newcomer: Trace
    long: Trace | None

    def failures(self) -> list[str]:
        """Why requests failed."""
        sent = (self.stream, self.newcomer, self.long)
        return [one.error for one in sent if one is not None and one.error]

    def figures(self) -> dict[str, float | None]:
        """What the long prompt may change; all None where a request failed."""
        stream_figures, newcomer = request_figures(self.stream), request_figures(self.newcomer)
        if self.failures() or stream_figures is None or newcomer is None:
            return dict.fromkeys(FIGURES)
        gaps = metrics.itl_ms([chunk.at_s for chunk in self.stream.chunks])
        return {
            "newcomer_ttft_ms": newcomer["ttft_ms"],
            "stream_tpot_ms": stream_figures["tpot_ms"],
            "stream_longest_gap_ms": max(gaps, default=None),
        }

    def met_prefill(self) -> bool | None:
        """Whether the newcomer was sent while the long prompt prefilled, and the stream decoded to
        the end of it. None without a long prompt."""
        if self.long is None:
            return None
        first, last = self.long.first_s, self.stream.last_s
        return first is not None and last is not None and self.newcomer.sent_s < first <= last


async def play(runner: Runner, sizes: Sizes, repeat: int, with_long: bool) -> Scene:
    """Send one scene."""
    names = ("stream", "newcomer", "long")
    depths = (sizes.short, sizes.short, sizes.long)
    outputs = (sizes.output, LONG_OUTPUT, LONG_OUTPUT)
    bodies = []
    for name, depth, output in zip(names, depths, outputs, strict=True):
        prompt = await runner.make(depth, f"interference/{name}/{repeat}")
        bodies.append(stream.encode(request_body(runner.model, prompt, output)))
    session, url = runner.server.session, runner.server.url + "/v1/completions"
    with stream.undisturbed():
        start_s = time.perf_counter()
        decoding = asyncio.Event()
        streaming = asyncio.create_task(stream.send(session, url, bodies[0], start_s, decoding))
        await decoding.wait()
        prefilling = None
        if with_long:
            prefilling = asyncio.create_task(stream.send(session, url, bodies[2], start_s))
        await asyncio.sleep(LEAD_S)
        newcomer = await stream.send(session, url, bodies[1], start_s)
        return Scene(await streaming, newcomer, await prefilling if prefilling else None)


async def measure(
    config: LoadConfig, sizes: Sizes, api_key: str | None
) -> tuple[dict[str, Any], list[tuple[Scene, Scene]]]:
    """Warm up, then both arms by turns; returns the result's head and (alone, beside) pairs."""
    async with run_module.session(config.timeout_s, api_key) as opened:
        server = Server(opened, config.url)
        facts = await server.facts(config.model)
        sizes.check(facts.window)
        telemetry = Telemetry.for_url(config.url)
        cells = [Cell(facts.window, facts.window, d, 2) for d in (sizes.long, sizes.short)]
        make = await run_module.make_prompts(server, facts, config, cells)
        runner = Runner(server, facts.model, config, make, telemetry)
        await warm_up(runner, cells[1:], say)
        pairs = []
        for repeat in range(config.repeats):
            order = (False, True) if repeat % 2 == 0 else (True, False)
            scenes = {arm: await play(runner, sizes, repeat, arm) for arm in order}
            if not await server.is_up():
                raise ServerUnusable("the server went away")
            pairs.append((scenes[False], scenes[True]))
            say(f"repeat {repeat + 1}/{config.repeats} done")
        head = {
            "server": facts.to_json(),
            "provenance": origin.collect(facts, config.url, telemetry),
        }
        return head, pairs


def summarize(pairs: Sequence[tuple[Scene, Scene]], seed: int) -> dict[str, Any]:
    """Medians of both arms, and beside over alone in pairs of one repeat."""
    figures = [[scene.figures() for scene in pair] for pair in pairs]
    entry: dict[str, Any] = {}
    for name in FIGURES:
        alone, beside = ([pair[arm][name] for pair in figures] for arm in (0, 1))
        found = {
            "alone": intervals.median(alone, seed),
            "beside": intervals.median(beside, seed),
            "ratio": intervals.ratio_of_medians(alone, beside, seed),
        }
        entry[name] = {key: value and asdict(value) for key, value in found.items()}
    longs = [beside.long and request_figures(beside.long) for _, beside in pairs]
    long_ttft = intervals.median([f["ttft_ms"] if f else None for f in longs], seed)
    return entry | {
        "long_ttft_ms": long_ttft and asdict(long_ttft),
        "met_prefill": [beside.met_prefill() for _, beside in pairs],
        "failures": sorted({f for pair in pairs for scene in pair for f in scene.failures()}),
    }


def run(config: LoadConfig, sizes: Sizes, output: Path, api_key: str | None) -> dict[str, Any]:
    """Measure, write the result, print the table.

    Raises:
        LoadError: bad input or no server.
        Unbelievable: requests failed, or the prefill was over too soon; the result is written.
    """
    if output.exists():
        raise LoadError(f"{output}: exists; a result is written once")
    head, pairs = uvloop.run(measure(config, sizes, api_key))
    summary = summarize(pairs, config.seed)
    result = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "sizes": asdict(sizes),
        **head,
        "summary": summary,
        "scenes": [[_plain(scene) for scene in pair] for pair in pairs],
    }
    write_result(output, result)
    print(render(result))
    if summary["failures"]:
        raise Unbelievable(f"requests failed: {'; '.join(summary['failures'])}")
    if not all(summary["met_prefill"]):
        raise Unbelievable(
            "the long prompt's prefill did not lie within the stream: take a longer answer, or a "
            "longer prompt"
        )
    return result


def render(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    summary, sizes = result["summary"], result["sizes"]
    rows = []
    for name in FIGURES:
        one = summary[name]
        rows.append([name, *(markdown.estimate(one[arm], 1) for arm in ("alone", "beside"))]
                    + [markdown.estimate(one["ratio"], 2)])  # fmt: skip
    table = markdown.table(["figure", "alone", "beside a long prefill", "ratio"], rows)
    title = f"## A prompt of {sizes['long']:,} tokens beside prompts of {sizes['short']:,}"
    ttft = f"TTFT of the long prompt: {markdown.estimate(summary['long_ttft_ms'], 0)} ms."
    return "\n\n".join([title, table, ttft, markdown.provenance_line(result)]) + "\n"


def _plain(scene: Scene) -> dict[str, Any]:
    return {
        name: sent and trace.to_json(sent)
        for name, sent in (
            ("stream", scene.stream), ("newcomer", scene.newcomer), ("long", scene.long)
        )
    }  # fmt: skip
