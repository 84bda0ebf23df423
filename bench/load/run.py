"""`python -m bench run`: measure a running server.

ask the server -> plan -> prompts -> warm up -> rounds, interleaved -> summarize -> write
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from bench.load import config as config_module
from bench.load import corpus, html, markdown, origin, result
from bench.load.config import Api, Cell, LoadConfig, Mode
from bench.load.errors import LoadError, Unbelievable
from bench.load.journal import Journal
from bench.load.progress import Progress, say
from bench.load.prompts import ChatPrompts, TokenPrompts
from bench.load.rounds import MakePrompt, Runner
from bench.load.server import Server, ServerFacts, differing, lasting
from bench.load.sizes import format_size
from bench.load.telemetry import Telemetry
from bench.load.warmup import warm_up


@dataclass(frozen=True)
class Files:
    """Where a run writes. The journal lies beside the result until the run is complete."""

    output: Path

    @property
    def journal(self) -> Path:
        """Rounds done so far."""
        return self.output.with_suffix(".rounds.jsonl")


def default_output(config: LoadConfig, folder: Path, now: datetime | None = None) -> Path:
    """A name in `results/` that says what was run and when."""
    contexts = "-".join(map(format_size, config.contexts)) or "window"
    streams = "-".join(map(str, config.streams))
    stamp = (now or datetime.now(UTC)).strftime("%Y-%m-%d-%H%M%S")
    label = f"{config.label}-" if config.label else ""
    return folder / f"load-{label}{contexts}-s{streams}-{config.mode.value}-{stamp}.json"


def plan(num_cells: int, repeats: int) -> list[tuple[int, int]]:
    """(cell, repeat) in the order of measurement: every cell once before any is repeated.

    Every other repeat goes backwards, so that drift does not favour a cell.
    """
    order = []
    for repeat in range(repeats):
        cells = range(num_cells) if repeat % 2 == 0 else reversed(range(num_cells))
        order += [(cell, repeat) for cell in cells]
    return order


@contextlib.asynccontextmanager
async def session(timeout_s: float, api_key: str | None) -> AsyncIterator[aiohttp.ClientSession]:
    """A session without a limit of connections or of a request's whole time.

    timeout_s: longest wait for the next bytes, a prefill included.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=timeout_s)
    async with aiohttp.ClientSession(
        headers=headers,
        timeout=timeout,
        connector=aiohttp.TCPConnector(limit=0),
        read_bufsize=1 << 20,
    ) as opened:
        yield opened


async def make_prompts(
    server: Server, facts: ServerFacts, config: LoadConfig, cells: list[Cell]
) -> MakePrompt:
    """Tokenize the text once; returns what makes prompts from it."""
    depth = max(cell.depth for cell in cells)
    if config.api is Api.CHAT:
        chats = ChatPrompts(
            corpus.text_for(5 * depth), config.seed, lambda t: server.count_chat(facts.model, t)
        )
        return chats.make
    if config.tokenizer is not None:
        tokenize, special = local_tokenizer(config.tokenizer)
    else:
        special = await special_tokens(server, facts.model)

        async def tokenize(text: str) -> list[int]:
            return await server.tokenize(facts.model, text)

    prompts = TokenPrompts(
        await corpus.tokens_for(depth, tokenize), special, config.text, config.seed
    )

    async def make(tokens: int, purpose: str) -> list[int]:
        return prompts.make(tokens, purpose)

    for cell in cells:  # refuses a depth without room for the nonce before anything is sent
        prompts.make(cell.depth, "check")
    return make


async def special_tokens(server: Server, model: str) -> tuple[int, ...]:
    """What the server's tokenizer puts before a text (BOS)."""
    plain = await server.tokenize(model, "a")
    marked = await server.tokenize(model, "a", special=True)
    return tuple(marked[: marked.index(plain[0])])


def local_tokenizer(path: Path) -> tuple[corpus.Tokenize, tuple[int, ...]]:
    """Tokenize with a `tokenizer.json`; for servers without /tokenize.

    Raises:
        LoadError: it cannot be read.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself
        raise LoadError(f"--tokenizer {file}: {error}") from error

    async def tokenize(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    plain = tokenizer.encode("a", add_special_tokens=False).ids
    marked = tokenizer.encode("a").ids
    return tokenize, tuple(marked[: marked.index(plain[0])])


def rehearse(config: LoadConfig, api_key: str | None) -> str:
    """What a run would send, as a table; everything is checked and no prompt is sent.

    Raises:
        LoadError: bad input or no server.
    """

    async def planned() -> list[Cell]:
        async with session(config.timeout_s, api_key) as opened:
            server = Server(opened, config.url)
            facts = await server.facts(config.model)
            check_mode(config, facts)
            cells = config.cells(facts.window)
            await make_prompts(server, facts, config, cells)
            return cells

    head = ["window / context / depth / streams", "repeats", "prompt tokens", "output tokens"]
    rows = []
    for cell in asyncio.run(planned()):
        sent = cell.streams * config.repeats
        sizes = (cell.window, cell.context, cell.depth, cell.streams)
        rows.append([" / ".join(f"{size:,}" for size in sizes), str(config.repeats)]
                    + [f"{sent * cell.depth:,}", f"{sent * config.output:,}"])  # fmt: skip
    return markdown.table(head, rows) + "\n\nWarm-up and priming come on top. Nothing was sent."


def check_mode(config: LoadConfig, facts: ServerFacts) -> None:
    """Refuse to measure a prefix cache that is off.

    Raises:
        LoadError: mode warm or followup, and the server says so.
    """
    if config.mode is not Mode.COLD and facts.prefix_caching is False:
        raise LoadError(f"mode {config.mode}: the server's prefix cache is off")


def check_same(resumed: Journal, header: dict[str, Any]) -> None:
    """Refuse to go on with the rounds of another server.

    Raises:
        LoadError: says what differs, then and now.
    """
    found = [
        *differing(lasting(resumed.header["server"]), lasting(header["server"])),
        *differing(*(origin.lasting(one["provenance"]) for one in (resumed.header, header))),
    ]
    if found:
        told = "; ".join(f"{name} = {then}, now {now}" for name, then, now in found)
        raise LoadError(f"{resumed.path}: was begun on another server: {told}")


async def measure(
    config: LoadConfig, files: Files, api_key: str | None, resumed: Journal | None
) -> dict[str, Any]:
    """Run what the journal does not have yet; returns the result, which is not written.

    Raises:
        LoadError: bad input, no server, or a run that cannot be believed.
    """
    async with session(config.timeout_s, api_key) as opened:
        server = Server(opened, config.url)
        facts = await server.facts(config.model)
        check_mode(config, facts)
        cells = config.cells(facts.window)
        telemetry = Telemetry.for_url(config.url)
        header = {
            "config": config_module.to_json(config),
            "server": facts.to_json(),
            "provenance": origin.collect(facts, config.url, telemetry),
        }
        if resumed is not None:
            check_same(resumed, header)
        make = await make_prompts(server, facts, config, cells)
        runner = Runner(server, facts.model, config, make, telemetry)
        warmed = await warm_up(runner, cells, say)
        journal = resumed or Journal.start(
            files.journal, header | {"warm_up": [asdict(w) for w in warmed]}
        )
        left = [step for step in plan(len(cells), config.repeats) if not journal.has(*step)]
        progress = Progress(cells, left)
        for number, repeat in left:
            async with progress.round(number, repeat, config.repeats):
                journal.add(await runner.run(number, cells[number], repeat))
    return result.assemble(config, cells, journal)


def run(
    config: LoadConfig,
    output: Path,
    api_key: str | None = None,
    resume: Path | None = None,
    go_on: Path | None = None,
) -> dict[str, Any]:
    """Measure, write the result with its Markdown and HTML, print the table.

    Args:
        resume: the journal of a run that was cut short.
        go_on: what --resume takes after this run is cut short; default: its journal.
    Raises:
        LoadError: see `measure`; the journal stays.
        Unbelievable: the result is written, and has problems.
        KeyboardInterrupt: after the rounds that are done were printed.
    """
    journal = None
    if resume is not None:
        journal = Journal.load(resume)
        recorded = config_module.from_json(journal.header["config"], config.tokenizer)
        config_module.check_kept(resume, recorded, config)
        config = replace(recorded, url=config.url if config.url != LoadConfig.url else recorded.url)
        output = resume.with_name(resume.name.removesuffix(".rounds.jsonl") + ".json")
    files = Files(output)
    if output.exists():
        raise LoadError(f"{output}: exists; a result is written once")
    if journal is None and files.journal.exists():
        raise LoadError(f"{files.journal}: exists; go on with --resume, or remove it")
    try:
        measured = uvloop.run(measure(config, files, api_key, journal))
    except BaseException as error:
        if files.journal.exists():
            report_partial(config, files, go_on or files.journal)
        if isinstance(error, asyncio.CancelledError):
            raise KeyboardInterrupt from error
        raise
    finish(measured, files)
    return measured


def finish(measured: dict[str, Any], files: Files) -> None:
    """Write the three files, drop the journal, print.

    Raises:
        Unbelievable: some cell has problems.
    """
    result.write(files.output, measured)
    text = markdown.render(measured)
    files.output.with_suffix(".md").write_text(text, encoding="utf-8")
    files.output.with_suffix(".html").write_text(html.render(measured), encoding="utf-8")
    files.journal.unlink(missing_ok=True)
    print(text)
    say(f"{files.output} written, and .md and .html beside it")
    found = result.problems(measured)
    if found:
        raise Unbelievable("not to be believed: " + "; ".join(found))


def report_partial(config: LoadConfig, files: Files, go_on: Path) -> None:
    """Print the rounds that are done; they stay in the journal."""
    journal = Journal.load(files.journal)
    if journal.done:
        cells = config.cells(journal.header["server"]["window"])
        print(markdown.render(result.assemble(config, cells, journal)))
    say(f"{len(journal.done)} rounds are kept; go on with: python -m bench run --resume {go_on}")
